"""A checkpoint as a source: its weights are read unit by unit into a skeleton on the meta device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
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
from effllm.journal import restore_structure
from effllm.source.base import Source


class StoredModel(Source):
    """A checkpoint whose weights are read unit by unit into a skeleton on the meta device.

    Raises:
        EffllmError: the config's class is unknown, the checkpoint is quantised already, lacks a weight that the class
            needs, or holds two different tensors for one tied weight.
    """

    model: PreTrainedModel

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"):
        found = checkpoint.quantization
        if found and (found["quant_method"] != "effllm" or found.get("sites")):
            raise EffllmError(
                f"{checkpoint.folder} is quantised already (quant_method {found['quant_method']!r}); compress the original "
                "weights"
            )
        self.checkpoint = checkpoint
        self.own_dtype = stored_dtype(checkpoint)
        self.dtype = dtype or self.own_dtype
        model = skeleton(checkpoint.config, self.dtype, device)
        super().__init__(restore_structure(model, checkpoint.config), device)
        self.targets = self._map_keys()
        """Key of the checkpoint -> name in the state dict, whether the class has it or not."""
        state = self.model.state_dict().keys()
        unloaded = [key for key, target in self.targets.items() if target not in state]
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
        return [key for key, target in self.targets.items() if target in names]

    def _check_headers(self) -> None:
        """What can be told before reading: tensors that lack or do not fit. Those that are converted are checked on load."""
        state, folder = self.model.state_dict(), self.checkpoint.folder
        converted = any(isinstance(entry, WeightConverter) for entry in self._conversions())
        given = set(self.targets.values())
        for names in self.units.values():
            lacking = [name for name in names if name not in given]
            if lacking and (not converted or len(lacking) == len(names)):
                raise EffllmError(self._lacks(lacking[0]))
        for key, target in self.targets.items():
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
