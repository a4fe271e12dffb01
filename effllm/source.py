"""A model as a stream of units, one of them in memory: from a checkpoint, or already live.

A unit is a repeated block, a weight outside the blocks (embedding, head), or `rest`: everything else.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from effllm.checkpoint import Checkpoint
from effllm.errors import EffllmError, UsageError
from effllm.site import find_blocks, find_sites

REST = "rest"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Source(ABC):
    """What methods see of a model: its structure, and one unit's weights at a time."""

    model: nn.Module

    def __init__(self, model: nn.Module, device: str | torch.device = "cpu"):
        self.model, self.device = model, torch.device(device)
        self.blocks = find_blocks(model)
        self.sites = find_sites(model)
        self.units = self._find_units()

    def _find_units(self) -> dict[str, list[str]]:
        """Unit -> names in the state dict that it holds; a tied weight belongs to the module that owns it."""
        tied = {f"{name}.weight" for site in self.sites for name in site.tied}
        tied |= set(getattr(self.model, "all_tied_weights_keys", None) or {})
        single = [site.name for site in self.sites if site.block is None]
        units: dict[str, list[str]] = {name: [] for name in (*single, REST, *self.blocks)}
        for key in self.model.state_dict():
            if key not in tied:
                owner = (name for name in (*self.blocks, *single) if key.startswith(name + "."))
                units[next(owner, REST)].append(key)
        return {name: keys for name, keys in units.items() if keys}

    @abstractmethod
    def resident(self, *units: str) -> contextlib.AbstractContextManager[None]:
        """While it is open, the weights of these units are in `model`, on `device`."""

    @torch.no_grad()
    def stream(self, batches: list[Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Runs `batches` of token ids `[sequences, length]` block by block, one block in memory at a time.

        Yields (block, input, output) with hidden states `[sequences, length, width]`, batch by batch within a block.

        Raises:
            UsageError: the model has several stacks of blocks, or changes hidden states between its blocks.
        """
        if len({block.rpartition(".")[0] for block in self.blocks}) != 1:
            raise UsageError(
                f"{type(self.model).__name__} has {len(self.blocks)} blocks in other than one stack; block-wise "
                "calibration walks a single stack: use a plan or a score that needs no data (--score zd)"
            )
        training = self.model.training
        self.model.eval()
        try:
            hidden, calls = self._record(batches)
            for block in self.blocks:
                with self.resident(block):
                    module = self.model.get_submodule(block)
                    for index, call in enumerate(calls):
                        args, kwargs = call[block]
                        out = module(hidden[index], *args, **kwargs)
                        out = out[0] if isinstance(out, tuple) else out
                        yield block, hidden[index], out
                        hidden[index] = out
        finally:
            self.model.train(training)

    def _record(self, batches: list[Tensor]) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """The first block's input, and every block's other arguments, exactly as the model's own code makes them."""
        base = self.model.base_model if isinstance(self.model, PreTrainedModel) else self.model
        used = set(base.modules())  # all of them: torch multiplies by a matrix on the meta device without a word
        outside = [u for u in self.units if u not in self.blocks and (u == REST or self.model.get_submodule(u) in used)]
        with self.resident(*outside):
            recorder = _Recorder(self.model, self.blocks)
            for as_tuple in (False, True):
                recorded = [recorder.run(base, batch.to(self.device), as_tuple) for batch in batches]
                if all(first is not None for first, _ in recorded):
                    return [first for first, _ in recorded], [calls for _, calls in recorded]  # type: ignore[misc]
        raise UsageError(
            f"{type(self.model).__name__} changes hidden states between its blocks, so they cannot be run one by one; "
            "use a plan or a score that needs no data (--score zd)"
        )


class _Recorder:
    """Replaces every block's forward by one that notes its arguments and passes the hidden states on."""

    def __init__(self, model: nn.Module, blocks: list[str]):
        self.modules = {name: model.get_submodule(name) for name in blocks}

    def run(self, base: nn.Module, batch: Tensor, as_tuple: bool) -> tuple[Tensor | None, dict[str, Any]]:
        """The first block's input (None if the model did not hand the blocks' outputs on as they are), and the calls."""
        calls: dict[str, Any] = {}
        seen: list[Tensor] = []

        def recording(name: str) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs.pop("hidden_states")
                kept = {k: None if k.startswith(("past_key_value", "layer_past")) else v for k, v in kwargs.items()}
                calls[name] = (args[1:], kept)
                seen.append(hidden)
                return (hidden, None, None) if as_tuple else hidden

            return forward

        try:
            for name, module in self.modules.items():
                module.forward = recording(name)
            if isinstance(base, PreTrainedModel):
                with contextlib.suppress(IndexError, ValueError) if not as_tuple else contextlib.nullcontext():
                    base(input_ids=batch, use_cache=False)
            else:
                base(batch)
        finally:
            for module in self.modules.values():
                del module.forward
        whole = len(calls) == len(self.modules) and all(tensor is seen[0] for tensor in seen)
        return (seen[0] if whole else None), calls


class LiveModel(Source):
    """A model that is in memory already."""

    def __init__(self, model: nn.Module):
        first = next(model.parameters(), None)
        super().__init__(model, first.device if first is not None else "cpu")

    def resident(self, *units: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


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
        self.dtype = dtype or stored_dtype(checkpoint)
        super().__init__(skeleton(checkpoint.config, self.dtype, device), device)
        self._targets = self._map_keys()
        state = self.model.state_dict().keys()
        self.unloaded = [key for key, target in self._targets.items() if target not in state]
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
    def resident(self, *units: str) -> Iterator[None]:
        empty = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers())
        loaded = [name for unit in units for name in self.units[unit]]
        try:
            self._load(units, set(loaded))
            yield
        finally:
            for name in loaded:
                parent, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(parent), leaf, empty[name])

    def _load(self, units: tuple[str, ...], expected: set[str]) -> None:
        keys = [key for unit in units for key in self._keys[unit]]
        with contextlib.ExitStack() as stack:
            handles = {
                file: stack.enter_context(safe_open(file, framework="pt", backend="pread"))
                for file in {self.checkpoint.tensors[key].file for key in keys}
            }
            slices = {key: handles[self.checkpoint.tensors[key].file].get_slice(key) for key in keys}
            settings = LoadStateDictConfig(dtype=self.dtype, weight_mapping=self._conversions())
            with quiet():
                info, _ = convert_and_load_state_dict_in_model(self.model, slices, settings)
        missing, mismatched = info.missing_keys & expected, sorted(info.mismatched_keys)
        if missing:
            raise EffllmError(self._lacks(sorted(missing)[0]))
        if mismatched:
            raise EffllmError(self._misfit(*mismatched[0]))
        for module in {name.rpartition(".")[0] for name in expected}:
            self.model.get_submodule(module)._apply(lambda t: t if t.is_meta else t.to(self.device), recurse=False)

    def on_disk(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """`tensors` of the unit loaded last under the names that `save_pretrained` would write."""
        return revert_weight_conversion(self.model, tensors)  # type: ignore[no-any-return]

    def raw(self, key: str) -> Tensor:
        """One tensor of the checkpoint exactly as it is stored."""
        with safe_open(self.checkpoint.tensors[key].file, framework="pt", backend="pread") as handle:
            return handle.get_tensor(key)  # type: ignore[no-any-return]


def model_class(config: dict[str, Any]) -> type[PreTrainedModel]:
    """The transformers class that `config.json` names under `architectures`.

    Raises:
        EffllmError: it names none, or one that the installed transformers does not have.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str):
        raise EffllmError(
            "config.json names no class under 'architectures'; add the one that transformers shall build, such as "
            "LlamaForCausalLM"
        )
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise EffllmError(
            f"config.json names the class {name!r}, which transformers {transformers.__version__} does not have; "
            "upgrade transformers, or load the model yourself and use effllm.compress(model)"
        )
    return found


def load_config(values: dict[str, Any]) -> PreTrainedConfig:
    """The transformers config of a `config.json` dictionary; remote code is never run."""
    known = {key: value for key, value in values.items() if key not in ("auto_map", "quantization_config")}
    kind = known.pop("model_type", None)
    if not isinstance(kind, str):
        raise EffllmError("config.json has no model_type")
    try:
        return AutoConfig.for_model(kind, **known)
    except ValueError:
        raise EffllmError(
            f"config.json has model_type {kind!r}, which transformers {transformers.__version__} does not know; upgrade "
            "transformers, or load the model yourself and use effllm.compress(model)"
        ) from None


def skeleton(config: dict[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The model that `config.json` describes, on the meta device but for what no checkpoint holds (rotary tables)."""
    cls = model_class(config)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = cls._from_config(load_config(config), dtype=dtype)
    except EffllmError:
        raise
    except Exception as error:  # transformers' checks and the class's own code raise whatever they like
        raise EffllmError(f"config.json describes no {cls.__name__}: {' '.join(str(error).split())}") from error
    model.eval()
    for module in model.modules():
        names = module._non_persistent_buffers_set & {n for n, b in module._buffers.items() if b is not None}
        for name in names:
            module._buffers[name] = torch.empty_like(cast(Tensor, module._buffers[name]), device=device)
        if names:
            model._init_weights(module)
    return model


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that the config names (what `from_pretrained` loads), else that of the largest tensor."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    text = checkpoint.config.get("text_config") or {}
    named = named or text.get("dtype") or text.get("torch_dtype")
    largest = max(checkpoint.tensors.values(), key=lambda tensor: tensor.nbytes)
    if named is None:
        return FLOATS.get(largest.dtype, torch.float32)
    dtype = getattr(torch, str(named).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise EffllmError(f"{checkpoint.folder / 'config.json'}: dtype {named!r} is no float dtype of torch")
    return dtype


def _equal(one: Any, other: Any) -> bool:
    tensors = []
    for stored in (one, other):
        with safe_open(stored.file, framework="pt", backend="pread") as handle:
            tensors.append(handle.get_tensor(stored.name))
    return torch.equal(*tensors)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars of transformers' own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
