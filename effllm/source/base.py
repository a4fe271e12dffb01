"""A model as a stream of units, one of them in memory at a time.

A unit is a repeated block, a large weight outside the blocks (embedding, head), or `rest`: everything else.
"""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from effllm.site import Site, find_blocks, find_sites
from effllm.source.lockstep import Call, lockstep

REST = "rest"
OWN_UNIT = 1 << 25  # bytes from which a weight outside the blocks is a unit of its own
HALVES = {
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
}  # dtypes of two bytes, and whether a CPU has instructions for them
Batch = Mapping[str, Tensor]
"""Inputs of one forward by name, e.g. `{"input_ids": [sequences, length]}`; a plain module gets them in order."""


class Source(ABC):
    """What methods see of a model: its structure, and one unit's weights at a time."""

    model: nn.Module
    own_dtype: torch.dtype
    """The dtype that the model's floats have where they come from."""

    def __init__(self, model: nn.Module, device: str | torch.device = "cpu"):
        self.model, self.device = model, torch.device(device)
        self.blocks = find_blocks(model)
        self.sites = find_sites(model)
        self.units = self._find_units()
        self._held: set[str] = set()
        self._partners = {site.parameter: [f"{name}.weight" for name in site.tied] for site in self.sites}

    def _find_units(self) -> dict[str, list[str]]:
        """Unit -> names in the state dict that it holds; a tied weight belongs to the module that owns it."""
        tied = {f"{name}.weight" for site in self.sites for name in site.tied}
        tied |= set(getattr(self.model, "all_tied_weights_keys", None) or {})
        state = self.model.state_dict()
        single = [s.name for s in self.sites if s.block is None and s.expert is None]
        single = [name for name in single if state[f"{name}.weight"].nbytes >= OWN_UNIT]
        units: dict[str, list[str]] = {name: [] for name in (*single, REST, *self.blocks)}
        for key in state:
            if key not in tied:
                owner = (name for name in (*self.blocks, *single) if key.startswith(name + "."))
                units[next(owner, REST)].append(key)
        return {name: keys for name, keys in units.items() if keys}

    @contextlib.contextmanager
    def resident(self, *units: str) -> Iterator[None]:
        """While it is open, the weights of these units are in `model`, on `device`."""
        new = tuple(unit for unit in units if unit not in self._held)
        self._held |= set(new)
        try:
            with self._loaded(new):
                yield
        finally:
            self._held -= set(new)

    @abstractmethod
    def _loaded(self, units: tuple[str, ...]) -> contextlib.AbstractContextManager[None]:
        """`resident` for units that are not."""

    def _owner(self, name: str) -> nn.Module:
        """The module that holds the tensor `name` of the state dict."""
        return self.model.get_submodule(name.rpartition(".")[0])

    def _get(self, name: str) -> Tensor:
        tensor: Tensor = getattr(self._owner(name), name.rpartition(".")[2])
        return tensor

    def _put(self, name: str, tensor: Tensor) -> None:
        """Sets a tensor of the model, in all places that share it."""
        for place in (name, *self._partners.get(name, ())):
            owner, leaf = self._owner(place), place.rpartition(".")[2]
            if leaf in owner._parameters and not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            setattr(owner, leaf, tensor)

    def walk(
        self,
        batches: Sequence[Batch],
        gates: Iterable[str] = (),
        grad: bool = False,
        results: list[Any] | None = None,
        whole: bool = False,
    ) -> Iterator[tuple[str, list[Call]]]:
        """Runs `batches` of model inputs unit by unit, stopping at the blocks, at large tables, and at the modules `gates`.

        A model runs without its head unless it is `whole`. Yields (gate, one call a batch), the gate's weights resident; a
        call whose output the caller leaves unset is computed when the walk goes on. Gates that the inputs never reach (a
        vision tower given text) do not come. `results` gets what each forward returned, in the order of the batches.
        """
        base = self.model if whole else self.base
        used = set(base.modules())  # all of them: torch multiplies by a matrix on the meta device without a word
        outside = [u for u in self.units if u not in self.blocks and (u == REST or self.model.get_submodule(u) in used)]
        tables = [u for u in outside if u != REST and isinstance(self.model.get_submodule(u), nn.Embedding)]
        returned: list[Any] = [None] * len(batches)

        def forward(number: int) -> None:
            returned[number] = run_batch(base, batches[number], self.device)

        named = {id(self.model.get_submodule(name)): name for name in reversed([*self.blocks, *tables, *gates])}
        stops = list(named.values())[::-1]
        with evaluating(self.model), self.resident(*(unit for unit in outside if unit not in stops)):
            forwards = [partial(forward, number) for number in range(len(batches))]
            yield from lockstep(self.model, stops, forwards, self.resident_at, grad)
        if results is not None:
            results += returned

    @contextlib.contextmanager
    def changed(self, weights: Mapping[str, Tensor], cast: bool = True) -> Iterator[None]:
        """While it is open, these parameters of resident units have other values, `cast` to the dtype that they had."""
        own = {name: self._get(name) for name in weights}
        try:
            for name, tensor in weights.items():
                self._put(name, tensor.to(own[name] if cast else own[name].device))
            yield
        finally:
            for name, tensor in own.items():
                self._put(name, tensor)

    @property
    def quick_dtype(self) -> torch.dtype | None:
        """What products of weights that are resident in fp32 may be computed in, several times as fast: the model's own
        dtype of two bytes, on a CPU with instructions for it."""
        dtype = arithmetic(self.own_dtype, self.device)
        return dtype if dtype in HALVES and self.device.type == "cpu" else None

    def quickly(self) -> contextlib.AbstractContextManager[Any]:
        """While it is open, products are computed in `quick_dtype`, where there is one."""
        return torch.autocast(self.device.type, self.quick_dtype, self.quick_dtype is not None)

    def units_of(self, sites: Iterable[Site]) -> list[str]:
        """The units that hold these weights."""
        wanted = {site.parameter for site in sites}
        return [unit for unit, names in self.units.items() if wanted & set(names)]

    @property
    def base(self) -> nn.Module:
        """What a walk runs: the model without its head, where transformers tells them apart."""
        return self.model.base_model if isinstance(self.model, PreTrainedModel) else self.model

    def resident_at(self, gate: str) -> contextlib.AbstractContextManager[None]:
        """`resident` for the unit that holds the weights of a module."""
        return self.resident(gate if gate in self.units else REST)

    def stream(self, batches: Sequence[Batch]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Runs `batches` block by block, one block in memory at a time, all stacks in call order.

        Yields (block, input, output), batch by batch within a block: hidden states `[sequences, length, width]`, or maps
        `[images, channels, height, width]`.
        """
        for gate, calls in self.walk(batches):
            for call in calls if gate in self.blocks else ():
                call.run()
                yield gate, call.given, call.returned


def in_dtype(batches: Sequence[Batch], dtype: torch.dtype | None) -> list[Batch]:
    """`batches` with their floats in `dtype`; as they are where it is None."""
    return [{k: v.to(dtype) if dtype and v.is_floating_point() else v for k, v in one.items()} for one in batches]


def arithmetic(dtype: torch.dtype, device: str | torch.device = "cpu") -> torch.dtype:
    """What to compute in: `dtype`, or fp32 on a CPU that has no instructions for it and takes several times as long."""
    kind = torch.device(device).type
    return torch.float32 if kind == "cpu" and dtype in HALVES and not HALVES[dtype]() else dtype


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While it is open, every module is in evaluation mode; then each is as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def run_batch(base: nn.Module, batch: Batch, device: torch.device) -> Any:
    """One forward of a model, or of the base model inside, without a KV cache."""
    inputs = {name: tensor.to(device) for name, tensor in batch.items()}
    if not isinstance(base, PreTrainedModel):
        return base(*inputs.values())
    parameters = inspect.signature(base.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    caches = "use_cache" in parameters or (takes_any and base.main_input_name == "input_ids")
    return base(**inputs, **({"use_cache": False} if caches else {}))
