"""A model as a stream of units, one of them in memory: from a checkpoint, or already live.

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
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from effllm.checkpoint import Checkpoint
from effllm.checkpoint.skeleton import FLOATS, quiet, skeleton, stored_dtype
from effllm.errors import EffllmError
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


class StoredModel(Source):
    """A checkpoint whose weights are read unit by unit into a skeleton on the meta device.

    Raises:
        EffllmError: the config's class is unknown, the checkpoint is quantised already, lacks a weight that the class
            needs, or holds two different tensors for one tied weight.
    """

    model: PreTrainedModel

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"):
        found = checkpoint.quantization()
        if found:
            raise EffllmError(
                f"{checkpoint.folder} is quantised already (quant_method {found!r}); compress the original weights"
            )
        self.checkpoint = checkpoint
        self.own_dtype = stored_dtype(checkpoint)
        self.dtype = dtype or self.own_dtype
        super().__init__(skeleton(checkpoint.config, self.dtype, device), device)
        self._targets = self._map_keys()
        state = self.model.state_dict().keys()
        unloaded = [key for key, target in self._targets.items() if target not in state]
        self.unloaded = {key: checkpoint.tensors[key].nbytes for key in unloaded}
        """Tensors of the checkpoint that the class does not load, and their bytes."""
        self._keys = {unit: self._keys_of(set(names)) for unit, names in self.units.items()}
        self._check_headers()
        self._check_tied()

    def _conversions(self) -> list[Any]:
        return list(get_model_conversion_mapping(self.model))

    def _map_keys(self) -> dict[str, str]:
        """Checkpoint key -> (first) name in the model's state dict, by transformers' own renaming rules."""
        mapping = self._conversions()
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        state, prefix = self.model.state_dict(), self.model.base_model_prefix
        targets = {}
        for key in self.checkpoint.tensors:
            target, _ = rename_source_key(key, renamings, converters, prefix, state)
            if target not in state and key in state:
                target, _ = rename_source_key(key, [], [], prefix, state)
            targets[key] = target
        return targets

    def _keys_of(self, names: set[str]) -> list[str]:
        return [key for key, target in self._targets.items() if target in names]

    def _check_headers(self) -> None:
        """What can be told before reading: tensors that lack or do not fit. Those that are converted are checked on load."""
        state, folder = self.model.state_dict(), self.checkpoint.folder
        converted = any(isinstance(entry, WeightConverter) for entry in self._conversions())
        given = set(self._targets.values())
        for names in self.units.values():
            lacking = [name for name in names if name not in given]
            if lacking and (not converted or len(lacking) == len(names)):
                raise EffllmError(self._lacks(lacking[0]))
        for key, target in self._targets.items():
            tensor = self.checkpoint.tensors[key]
            if target not in state:
                continue
            if state[target].is_floating_point() and tensor.dtype not in FLOATS:
                raise EffllmError(
                    f"{folder}: {key} is stored as {tensor.dtype}, which is no float: quantised already, or a corrupt "
                    "header; compress the original weights"
                )
            if not converted and tensor.shape != state[target].shape:
                raise EffllmError(self._misfit(target, tensor.shape, state[target].shape))

    def _lacks(self, name: str) -> str:
        needs = f"{self.checkpoint.folder} lacks {name}, which {type(self.model).__name__} needs"
        return needs + "; download it again, or correct config.json"

    def _misfit(self, name: str, found: Sequence[int], wanted: Sequence[int]) -> str:
        return (
            f"{self.checkpoint.folder}: {name} has shape {list(found)}, but config.json describes {list(wanted)}; "
            "download both again"
        )

    def _check_tied(self) -> None:
        for site in self.sites:
            for name in site.tied:
                pair = self._keys_of({f"{site.name}.weight"}) + self._keys_of({f"{name}.weight"})
                if len(pair) == 2 and not _equal(*(self.checkpoint.tensors[key] for key in pair)):
                    raise EffllmError(
                        f"{self.checkpoint.folder}: the config ties {name} to {site.name}, but {pair[0]} and {pair[1]} "
                        "differ; set tie_word_embeddings to false in config.json"
                    )

    @contextlib.contextmanager
    def _loaded(self, units: tuple[str, ...]) -> Iterator[None]:
        empty = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers())
        loaded = [name for unit in units for name in self.units[unit]]
        try:
            self._load(units, set(loaded))
            for name in loaded:
                if self._partners.get(name):
                    self._put(name, self._get(name))
            yield
        finally:
            for name in loaded:
                self._put(name, empty[name])

    def _load(self, units: tuple[str, ...], expected: set[str]) -> None:
        keys = [key for unit in units for key in self._keys[unit]]
        with contextlib.ExitStack() as stack:
            handles = {
                file: stack.enter_context(safe_open(file, framework="pt", backend="pread"))
                for file in {self.checkpoint.tensors[key].file for key in keys}
            }
            slices = {key: handles[self.checkpoint.tensors[key].file].get_slice(key) for key in keys}
            settings = LoadStateDictConfig(
                dtype=self.dtype,
                dtype_plan=self.model._get_dtype_plan(self.dtype),
                weight_mapping=self._conversions(),
            )
            with quiet():
                info, _ = convert_and_load_state_dict_in_model(self.model, slices, settings)
        missing, mismatched = info.missing_keys & expected, sorted(info.mismatched_keys)
        if missing:
            raise EffllmError(self._lacks(sorted(missing)[0]))
        if mismatched:
            raise EffllmError(self._misfit(*mismatched[0]))
        for module in {self._owner(name) for name in expected}:
            module._apply(lambda t: t if t.is_meta else t.to(self.device), recurse=False)
            module.requires_grad_(False)  # a gradient of a block's weights would be as large as the block

    def raw(self, key: str) -> Tensor:
        """One tensor of the checkpoint exactly as it is stored."""
        with safe_open(self.checkpoint.tensors[key].file, framework="pt", backend="pread") as handle:
            return handle.get_tensor(key)  # type: ignore[no-any-return]


def _equal(one: Any, other: Any) -> bool:
    tensors = []
    for stored in (one, other):
        with safe_open(stored.file, framework="pt", backend="pread") as handle:
            tensors.append(handle.get_tensor(stored.name))
    return torch.equal(*tensors)
