"""A model that is in memory already, as a source."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from effllm.source.base import Source


class LiveModel(Source):
    """A model that is in memory already.

    Args:
        model: any module.
        dtype: what its floats are cast to while they are resident; left as they are by default.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None):
        first = next(model.parameters(), None)
        self.dtype = dtype
        self.own_dtype = first.dtype if first is not None else torch.float32
        super().__init__(model, first.device if first is not None else "cpu")

    @contextlib.contextmanager
    def _loaded(self, units: tuple[str, ...]) -> Iterator[None]:
        own = {name: tensor for name, tensor in self._tensors(units) if self._is_cast(tensor)}
        try:
            for name, tensor in own.items():
                self._put(name, tensor.detach().to(self.dtype))
            yield
        finally:
            for name, tensor in own.items():
                if name.rpartition(".")[2] in self._owner(name)._parameters | self._owner(name)._buffers:
                    self._put(name, tensor)  # a codec layer may have taken its place

    def _tensors(self, units: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        for name in (name for unit in units for name in self.units[unit]):
            yield name, self._get(name)

    def _is_cast(self, tensor: Tensor) -> bool:
        return self.dtype is not None and tensor.is_floating_point() and tensor.dtype != self.dtype
