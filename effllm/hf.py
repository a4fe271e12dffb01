"""Compressed models as ordinary transformers models: the config, the quantizer, and the guard.

A compressed folder is a Hugging Face folder whose `config.json` carries the journal under `quantization_config`. The
quantizer registered here replaces the journal's sites on the meta device, and the loader then fills the stored tensors
straight in. One guard tensor of shape [1], named as a dense weight, makes a transformers that does not know effllm refuse
the folder instead of returning random weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import effllm
from effllm.checkpoint.checksum import checksum, to_text
from effllm.errors import EffllmError, UsageError
from effllm.journal import Entries, attach_edits, codecs, edit_entries, edits, entries, shapes
from effllm.layers import tie
from effllm.layers.experts import CodecExpertGroup
from effllm.layers.placing import attach, by_parameter, codec_modules, decode_all, encode, install
from effllm.method import Codec
from effllm.plans import Plan, load_plan
from effllm.site import Site, find_sites

FORMAT = 1


@register_quantization_config("effllm")
class EffllmConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed folder.

    `sites` is the journal (see `effllm.journal.entries`), `shapes` those of its matrices, `format` the version of the
    folder's format, `version` the effllm that wrote it, `plan` the plan carried out, `source` the identity of the
    checkpoint it was made from, `checksums` those of all tensors (see `effllm.checkpoint.checksum`), and `edits` what is
    put on the loaded model.

    For `from_pretrained(name, quantization_config=effllm.Config(plan="uniform-4bit"))` only `plan` is given: a preset's
    name, a file, a dictionary or a `Plan` that needs no data.
    """

    def __init__(
        self,
        sites: Entries | None = None,
        shapes: Entries | None = None,
        format: int = FORMAT,
        version: str | None = None,
        plan: str | Path | dict[str, Any] | Plan | None = None,
        source: dict[str, Any] | None = None,
        checksums: str | None = None,
        edits: Entries | None = None,
        quant_method: str | None = None,
        **unknown: Any,
    ):
        if not isinstance(format, int) or format > FORMAT:
            raise EffllmError(
                f"the folder has format {format!r}, written by effllm {version}; this is effllm {effllm.__version__}, "
                f"which reads up to {FORMAT}: pip install --upgrade effllm"
            )
        if plan is not None and quant_method is None:  # written by a caller, and not read from a config.json
            plan = load_plan(plan).model_dump(mode="json", exclude_defaults=True)
        lists: dict[str, Any] = {"sites": sites, "shapes": shapes, "edits": edits}
        for name, value in (lists | {"plan": plan, "source": source}).items():
            kind: type = list if name in lists else dict
            if not isinstance(value or kind(), kind):
                raise EffllmError(
                    f"config.json: quantization_config.{name} = {str(value)[:80]} is no {kind.__name__}; download it again"
                )
        self.quant_method = "effllm"  # type: ignore[assignment]
        self.format = format
        self.version = version or effllm.__version__
        self.sites, self.shapes = sites or [], shapes or []
        self.plan = cast(dict[str, Any], plan or {})
        self.source = source or {}
        self.checksums = checksums
        self.edits = edits or []


class EncodeOnLoad(ConversionOps):
    """Encodes each weight as transformers reads it, so that one dense weight at a time is in memory.

    Raises:
        UsageError: the plan orders blocks, which takes data, or all the weights before the first is encoded.
    """

    def __init__(self, model: PreTrainedModel, plan: dict[str, Any]):
        if not plan:
            raise UsageError("effllm.Config needs a plan to compress on load: effllm.Config(plan='uniform-4bit')")
        wanted = load_plan(plan)
        if wanted.scores():
            raise UsageError(
                f"plan {wanted.name} orders blocks by {wanted.scores()[0].label()}, which cannot be known while loading: "
                "use a uniform plan here, or effllm.compress(model, plan) after loading"
            )
        self.sites = find_sites(model)
        self.assigned = wanted.assign(self.sites, {})
        self.members = by_parameter(self.sites, self.assigned)
        self.edits = wanted.edits()
        if wanted.structure():
            raise UsageError(
                f"{wanted.structure()[0].label()} learns new weights, which cannot be done while loading: use "
                "effllm.compress after it"
            )

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], model: nn.Module, missing_keys: set[str], **kwargs: Any
    ) -> dict[str, Tensor]:
        """Puts the codec layer of a weight just read into `model`; nothing is left for the loader to set."""
        for name, value in input_dict.items():
            dense = value[0] if isinstance(value, list) else value
            owner, _, leaf = name.rpartition(".")
            model.get_submodule(owner)._parameters[leaf] = nn.Parameter(dense, requires_grad=False)
            members = self.members[name]
            install(model, members, encode(model, members))
            tied = [f"{other}.weight" for sites in members.values() for other in sites[0].tied]
            missing_keys.difference_update([name, *tied])
        return {}


@register_quantizer("effllm")
class EffllmQuantizer(HfQuantizer):
    """Rebuilds the journal's sites before the weights are read."""

    requires_calibration = False
    quantization_config: EffllmConfig
    encoder: EncodeOnLoad

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        if self.pre_quantized:
            attach_edits(model, edits(self.quantization_config.edits), structure=True)
            attach(model, codecs(self.quantization_config.sites))
            _ignore_guard(model)
        else:
            self.encoder = EncodeOnLoad(model, self.quantization_config.plan)
            self.quantization_config.sites = entries(self.encoder.assigned)
            self.quantization_config.shapes = shapes(self.encoder.sites, self.encoder.assigned)
            self.quantization_config.edits = edit_entries(self.encoder.edits)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        return not self.pre_quantized and param_name in self.encoder.members

    def get_quantize_ops(self) -> EncodeOnLoad:
        return self.encoder

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        model._weight_conversions = []  # type: ignore[assignment]  # names in a packed folder are module paths
        layers = codec_modules(model)
        for name, layer in layers.items():
            if layer.owner is not None:
                tie(layer, layers[layer.owner])
                continue
            for key, tensor in layer.stored().items() if self.pre_quantized else ():
                if not (tensor.is_meta or getattr(tensor, "_is_hf_initialized", False)):
                    raise EffllmError(
                        f"the checkpoint lacks {name}.{key}, or holds it in another shape; it is incomplete: write or "
                        "download it again"
                    )
        model.add_model_tags("effllm")
        attach_edits(model, edits(self.quantization_config.edits), structure=False)
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        self.quantization_config.source = self.quantization_config.source or _source(model)
        state = model.state_dict() | guard(model)
        whole = not any(tensor.is_meta for tensor in state.values())  # some are, where layers are offloaded
        numbers = to_text(checksum(name, tensor) for name, tensor in state.items()) if whole else None
        self.quantization_config.checksums = numbers
        return state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        return cast(PreTrainedModel, decode_all(model))


def guard(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensor that makes a transformers without effllm refuse the folder; empty where nothing is compressed.

    It stands in the place of a dense weight of the base model, which every Auto class has, if there is one.
    """
    name = guarded(model, list(_replaced(model)))
    return {name: torch.zeros(1, dtype=torch.uint8)} if name else {}


def guarded(model: PreTrainedModel, parameters: list[str]) -> str | None:
    """Which of the compressed `parameters` the guard stands for."""
    inside = [name for name in parameters if name.startswith(model.base_model_prefix + ".")]
    return next(iter(inside or parameters), None)


def _replaced(model: PreTrainedModel) -> dict[str, None]:
    """The dense parameters that codec layers stand for, in order."""
    names = (
        name.rpartition(".")[0] if isinstance(module, CodecExpertGroup) else f"{name}.weight"
        for name, module in codec_modules(model).items()
    )
    return dict.fromkeys(names)


def _ignore_guard(model: PreTrainedModel) -> None:
    """Our own load does not report the guard, whatever class is loaded and whatever site carries it."""
    current = model._keys_to_ignore_on_load_unexpected
    container = list if current is None else type(current)
    prefix = model.base_model_prefix + "."
    patterns = [rf"(^|\.){re.escape(name.removeprefix(prefix))}$" for name in _replaced(model)]
    model._keys_to_ignore_on_load_unexpected = container([*(current or ()), *patterns])


def mark_compressed(model: nn.Module, sites: list[Site], assigned: dict[str, Codec], plan: Plan) -> None:
    """Gives a model compressed in memory what `from_pretrained` gives a compressed one, so that it saves alike."""
    if not isinstance(model, PreTrainedModel):
        return
    config = EffllmConfig(entries(assigned), shapes(sites, assigned), plan=plan, edits=edit_entries(plan.edits()))
    state = {"hf_quantizer": EffllmQuantizer(config), "is_quantized": True, "quantization_method": "effllm"}
    for name, value in state.items():
        setattr(model, name, value)
    model.config.quantization_config, model.config._is_quantized = config, True
    model._weight_conversions = []  # type: ignore[assignment]
    _ignore_guard(model)
    model.add_model_tags("effllm")


def _source(model: PreTrainedModel) -> dict[str, Any]:
    """`source` of a model compressed in memory: the hub id, or the name of the folder, that it was loaded from."""
    path = str(model.config.name_or_path or "")
    name = Path(path).name if Path(path).is_dir() else path
    return {"model": name} if name else {}
