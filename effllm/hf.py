"""Compressed models as ordinary transformers models: the quantizer, and putting codec layers in and out of a model.

A compressed folder is a Hugging Face folder whose `config.json` carries the journal under `quantization_config`. The
quantizer registered here replaces the journal's sites on the meta device, and the loader then fills the stored tensors
straight in. One guard tensor of shape [1], named as a dense weight, makes a transformers that does not know effllm refuse
the folder instead of returning random weights.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import effllm
from effllm.errors import EffllmError
from effllm.journal import Entries, codecs, entries
from effllm.layers import CodecModule, codec_layer, empty_stored, tie
from effllm.layers.experts import (
    PACKED,
    CodecExpertGroup,
    CodecExperts,
    CodecExpertWeights,
    codec_experts,
    dense_experts,
)
from effllm.method import Codec
from effllm.site import Site, find_sites

FORMAT = 1
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


@register_quantization_config("effllm")
class EffllmConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed folder.

    `sites` is the journal (see `effllm.journal.entries`), `format` the version of the folder's format, `version` the
    effllm that wrote it, `plan` the plan carried out and `source` the identity of the checkpoint it was made from.
    """

    def __init__(
        self,
        sites: Entries | None = None,
        format: int = FORMAT,
        version: str | None = None,
        plan: dict[str, Any] | None = None,
        source: dict[str, Any] | None = None,
        quant_method: str = "effllm",
        **unknown: Any,
    ):
        if not isinstance(format, int) or format > FORMAT:
            raise EffllmError(
                f"the folder has format {format!r}, written by effllm {version}; this is effllm {effllm.__version__}, "
                f"which reads up to {FORMAT}: pip install --upgrade effllm"
            )
        for name, value, kind in (("sites", sites, list), ("plan", plan, dict), ("source", source, dict)):
            if not isinstance(value or kind(), kind):
                raise EffllmError(
                    f"config.json: quantization_config.{name} = {str(value)[:80]} is no {kind.__name__}; download it again"
                )
        self.quant_method = "effllm"  # type: ignore[assignment]
        self.format = format
        self.version = version or effllm.__version__
        self.sites = sites or []
        self.plan = plan or {}
        self.source = source or {}


@register_quantizer("effllm")
class EffllmQuantizer(HfQuantizer):
    """Rebuilds the journal's sites before the weights are read."""

    requires_calibration = True
    quantization_config: EffllmConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        attach(model, codecs(self.quantization_config.sites))
        _ignore_guard(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        layers = codec_modules(model)
        tied = {}
        for target, source in model.all_tied_weights_keys.items():
            pair = target.rpartition(".")[0], source.rpartition(".")[0]
            if pair[0] in layers and pair[1] in layers:
                tied[pair[0]] = pair[1]
        for name, layer in layers.items():
            if name in tied:
                tie(layer, layers[tied[name]])
                continue
            for key, tensor in layer.stored().items():
                if not (tensor.is_meta or getattr(tensor, "_is_hf_initialized", False)):
                    raise EffllmError(
                        f"the checkpoint lacks {name}.{key}, or holds it in another shape; it is incomplete: write or "
                        "download it again"
                    )
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        return model.state_dict() | guard(model), {}

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


def codec_modules(model: nn.Module) -> dict[str, CodecModule]:
    """Every compressed layer of a model by module path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CodecModule)}


def guard(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensor that makes a transformers without effllm refuse the folder; empty where nothing is compressed."""
    modules = codec_modules(model)
    plain = [name for name, module in modules.items() if not isinstance(module, CodecExpertGroup)]
    if plain:
        return guard_tensor(model, f"{plain[0]}.weight", None)
    for name in modules:
        weights = cast(CodecExpertWeights, model.get_submodule(name.rpartition(".")[0]))
        return guard_tensor(model, _dense_name(name), weights.dense_shape)
    return {}


def guard_tensor(model: PreTrainedModel, parameter: str, experts: Sequence[int] | None) -> dict[str, Tensor]:
    """The guard in the place of `parameter`; where that holds `experts` (its shape), under the first of its disk names."""
    if experts is not None:
        dense = torch.empty(tuple(experts), device="meta")
        parameter = next(iter(revert_weight_conversion(model, {parameter: dense})))
    return {parameter: torch.zeros(1, dtype=torch.uint8)}


def _dense_name(group: str) -> str:
    """The parameter that a group of experts (`...experts.packed_up_proj.0`) stands for: `...experts.up_proj`."""
    owner, _, leaf = group.rpartition(".")[0].rpartition(".")
    return f"{owner}.{leaf.removeprefix(PACKED)}"


def _ignore_guard(model: PreTrainedModel) -> None:
    """Our own load does not report the guard, whatever class is loaded and whatever site carries it."""
    current = model._keys_to_ignore_on_load_unexpected
    container = list if current is None else type(current)
    prefix = model.base_model_prefix + "."
    names = [
        _dense_name(name) if isinstance(module, CodecExpertGroup) else f"{name}.weight"
        for name, module in codec_modules(model).items()
    ]
    patterns = [rf"(^|\.){re.escape(name.removeprefix(prefix))}$" for name in dict.fromkeys(names)]
    model._keys_to_ignore_on_load_unexpected = container([*(current or ()), *patterns])


@cache
def return_freed_memory() -> None:
    """Has glibc give freed blocks above 1 MB back at once.

    By default it learns to keep blocks of up to 32 MB, and the temporaries of decoding a model slice by slice then hold
    hundreds of megabytes that nothing uses.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 20)


def attach(model: nn.Module, assigned: dict[str, Codec]) -> None:
    """Puts uninitialised codec layers at the sites of a journal. Works on the meta device.

    A site that the class does not have (the head under `AutoModel`) is skipped; names with and without the base model's
    prefix are tried.

    Raises:
        EffllmError: not one of the sites exists.
    """
    return_freed_memory()
    sites = {site.name: site for site in find_sites(model)}
    prefix = getattr(model, "base_model_prefix", "")
    found = {}
    for name, codec in assigned.items():
        candidates = (name, f"{prefix}.{name}", name.removeprefix(prefix + "."))
        site = next((candidate for candidate in candidates if candidate in sites), None)
        if site is not None:
            found[site] = codec
    if assigned and not found:
        raise EffllmError(f"none of the journal's sites ({next(iter(assigned))}, ...) is in {type(model).__name__}")
    device = next(model.parameters()).device
    for members in by_parameter(sites.values(), found).values():
        stored = {
            codec: empty_stored(codec, group[0].shape, device, None if group[0].expert is None else len(group))
            for codec, group in members.items()
        }
        install(model, members, stored)


def by_parameter(sites: Iterable[Site], assigned: dict[str, Codec]) -> dict[str, dict[Codec, list[Site]]]:
    """Name in the state dict -> the codecs of the sites that it holds: one, or one for each group of experts."""
    found: dict[str, dict[Codec, list[Site]]] = {}
    for site in sites:
        if site.name in assigned:
            found.setdefault(site.parameter, {}).setdefault(assigned[site.name], []).append(site)
    return found


def install(model: nn.Module, members: dict[Codec, list[Site]], stored: dict[Codec, dict[str, Tensor]]) -> None:
    """Replaces the module of one parameter by `encoded_module`, at every place that is tied to it."""
    (site, *_), *_ = members.values()
    owner = site.parameter.rpartition(".")[0]
    module = encoded_module(model.get_submodule(owner), members, stored)
    if isinstance(module, CodecModule):
        replace(model, site, module)
    else:
        model.set_submodule(owner, module)


def encoded_module(
    module: nn.Module, members: dict[Codec, list[Site]], stored: dict[Codec, dict[str, Tensor]]
) -> nn.Module:
    """`module` with one of its parameters in encoded form; `members` and `stored` as `by_parameter` and `encode` give."""
    (codec, (site, *_)), *_ = members.items()
    if site.expert is None:
        return codec_layer(module, codec, stored[codec])
    experts = {codec: tuple(cast(int, s.expert) for s in group) for codec, group in members.items()}
    return codec_experts(module, site.parameter.rpartition(".")[2], experts, stored)


def replace(model: nn.Module, site: Site, layer: CodecModule) -> None:
    """Puts `layer` at `site`, and layers that share its tensors at the places tied to it."""
    model.set_submodule(site.name, layer)
    for name in site.tied:
        model.set_submodule(name, codec_layer(model.get_submodule(name), layer.codec, layer.stored(), owner=False))
        if isinstance(model, PreTrainedModel):
            parameters = [key for key, tensor in layer.stored().items() if isinstance(tensor, nn.Parameter)]
            stored = {f"{name}.{key}": f"{site.name}.{key}" for key in parameters}
            for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
                keys = dict(getattr(model, attribute, None) or {})
                keys.pop(f"{name}.weight", None)
                setattr(model, attribute, keys | stored)


def mark_compressed(model: nn.Module, assigned: dict[str, Codec], plan: dict[str, Any]) -> None:
    """Gives a model compressed in memory what `from_pretrained` gives a compressed one, so that it saves alike."""
    if not isinstance(model, PreTrainedModel):
        return
    config = EffllmConfig(entries(assigned), plan=plan)
    state = {"hf_quantizer": EffllmQuantizer(config), "is_quantized": True, "quantization_method": "effllm"}
    for name, value in state.items():
        setattr(model, name, value)
    model.config.quantization_config, model.config._is_quantized = config, True
    _ignore_guard(model)


def decode_all(model: nn.Module) -> nn.Module:
    """Replaces every codec layer by the dense class it stands for, with its decoded weight; ties stay ties."""
    for name, module in list(model.named_modules()):
        if isinstance(module, CodecExperts):
            model.set_submodule(name, dense_experts(module))
    weights: dict[int, nn.Parameter] = {}
    for name, layer in codec_modules(model).items():
        owner = id(next(iter(layer.stored().values())))
        if owner not in weights:
            weights[owner] = nn.Parameter(layer.decoded(), requires_grad=False)
        model.set_submodule(name, layer.dense(weights[owner]))
        for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
            keys = getattr(model, attribute, None) or {}
            renamed = {}
            for target, source in keys.items():
                if target.startswith(name + "."):
                    target = _as_weight(target, name, layer)
                    source = _as_weight(source, source.rpartition(".")[0], layer)
                renamed[target] = source
            setattr(model, attribute, renamed)
    return model


def _as_weight(key: str, owner: str, layer: CodecModule) -> str:
    """`owner.codes` (or another stored tensor) as `owner.weight`; other names as they are."""
    return f"{owner}.weight" if key.removeprefix(owner + ".") in layer.stored_names else key
