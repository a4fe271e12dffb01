"""What every layer that holds a weight in its encoded form has in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from effllm.layers.weight import PackedWeight
from effllm.method import Codec

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class CodecModule(nn.Module):
    """The codec, the matrix's shape and the stored tensors."""

    codec: Codec
    matrix_shape: tuple[int, int]
    compute_dtype: torch.dtype
    stored_names: tuple[str, ...]
    replaced_class: type[nn.Module]
    owner: str | None
    """Module path of the layer whose stored tensors this one uses; None where it has its own."""

    def stored(self) -> dict[str, Tensor]:
        """The stored tensors by name, as `Codec.encode` returned them."""
        return {name: getattr(self, name) for name in self.stored_names}

    def store(self, stored: dict[str, Tensor], owner: str | None = None) -> None:
        """Holds `stored`; where they are those of another layer, the `owner`, this one saves none of its own.

        Integers are frozen parameters, which loaders and offloading treat as they treat any weight. Floats are buffers:
        `model.dtype` is the dtype of the first float parameter, and a scale must not decide it.
        """
        self.stored_names, self.owner = tuple(stored), owner
        for name, tensor in stored.items():
            if tensor.is_floating_point():
                self.register_buffer(name, tensor, persistent=owner is None)
            else:
                parameter = nn.Parameter(tensor, requires_grad=False) if owner is None else cast(nn.Parameter, tensor)
                self.register_parameter(name, parameter)

    def arrange(self, matrix: Tensor) -> Tensor:
        """A matrix `[rows, columns]` laid out as the weight of the class that this layer replaces; a view."""
        return matrix

    @property
    def weight(self) -> Tensor:
        """The dense weight as metadata, decoded where its values are read; see `PackedWeight`."""
        return PackedWeight.of(self, getattr(self, self.stored_names[0]).device)

    def decoded(self) -> Tensor:
        """The dense weight in the layer's dtype, laid out as in the class that this layer replaces."""
        return self.arrange(self.codec.decode(self.stored(), self.matrix_shape).to(self.compute_dtype)).contiguous()

    def decoded_row(self, row: int) -> Tensor:
        """`decoded()[row]`, without the other rows where the codec can."""
        if type(self).arrange is not CodecModule.arrange:
            return self.decoded()[row]
        index = torch.tensor([row % self.matrix_shape[0]], device=getattr(self, self.stored_names[0]).device)
        return self.codec.decode_rows(self.stored(), index, self.matrix_shape)[0].to(self.compute_dtype)

    def dense(self, weight: nn.Parameter) -> nn.Module:
        """The layer of the class that this one replaces, with `weight` (see `decoded`) in place of the stored tensors."""
        module = self.replaced_class.__new__(self.replaced_class)
        dropped = {"codec", "matrix_shape", "compute_dtype", "stored_names", "owner"}
        module.__dict__.update({key: value for key, value in self.__dict__.items() if key not in dropped})
        for kind in ("_parameters", "_buffers"):
            module.__dict__[kind] = {n: t for n, t in self.__dict__[kind].items() if n not in self.stored_names}
        module._parameters["weight"] = weight
        return module

    def extra_repr(self) -> str:
        return f"{self.codec.label()}, shape={list(self.matrix_shape)}, dtype={self.compute_dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodecModule:
        """Moves everything, and casts nothing that is stored: `.to(dtype)` changes the dtype of the arithmetic."""
        frozen = {id(tensor): tensor.dtype for tensor in self.stored().values() if tensor.is_floating_point()}

        def move(tensor: Tensor) -> Tensor:
            dtype = frozen.get(id(tensor))
            if dtype is None:
                return fn(tensor)
            return fn(tensor.data.view(INTEGERS[dtype.itemsize])).view(dtype)

        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        super()._apply(move, recurse)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        from effllm.layers import rebuild

        return rebuild, (self.replaced_class, self.__dict__)
