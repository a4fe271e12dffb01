"""Putting codec layers into a model and taking them out again."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from types import MappingProxyType
from typing import cast

import torch
from torch import Tensor, nn

from effllm.errors import EffllmError
from effllm.layers import CodecModule, codec_layer, empty_stored
from effllm.layers.experts import CodecExperts, codec_experts, dense_experts
from effllm.method import Codec
from effllm.moments import Moments
from effllm.site import Site, find_sites

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
Members = dict[Codec, list[Site]]
"""The sites of one parameter by their codec: one site, or groups of experts."""
Stored = dict[Codec, dict[str, Tensor]]
"""What each codec stores for them; stacked `[experts, ...]` where they are experts."""


def codec_modules(model: nn.Module) -> dict[str, CodecModule]:
    """Every compressed layer of a model by module path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CodecModule)}


def by_parameter(sites: Iterable[Site], assigned: dict[str, Codec]) -> dict[str, Members]:
    """Name in the state dict -> the codecs of the sites that it holds: one, or one for each group of experts."""
    found: dict[str, Members] = {}
    for site in sites:
        if site.name in assigned:
            found.setdefault(site.parameter, {}).setdefault(assigned[site.name], []).append(site)
    return found


@torch.no_grad()
def encode(model: nn.Module, members: Members, found: Mapping[str, Moments] = MappingProxyType({})) -> Stored:
    """What each codec stores for the sites of one parameter; stacked `[experts, ...]` where they are experts.

    `found` are the moments of the sites that have some.

    Raises:
        EffllmError: a weight holds NaN or inf.
    """
    stored = {}
    for codec, sites in members.items():
        encoded = []
        for site in sites:
            weight, moments = site.matrix(model), found.get(site.name)
            refuse_nonfinite(site.parameter, weight)
            data = codec.encode(weight, moments)
            encoded.append(data if moments is None else codec.refine(data, weight, moments))
        single = sites[0].expert is None
        stored[codec] = encoded[0] if single else {key: torch.stack([e[key] for e in encoded]) for key in encoded[0]}
    return stored


def decode_stored(model: nn.Module, members: Members, stored: Stored) -> Tensor:
    """The parameter as a dense tensor again, from what `encode` gives; differentiable in what is trained of that."""
    (site, *_), *_ = members.values()
    dense = model.get_parameter(site.parameter).detach()
    experts = list(dense.unbind()) if site.expert is not None else [dense]
    for codec, sites in members.items():
        for place, one in enumerate(sites):
            data = stored[codec]
            mine = data if one.expert is None else {name: tensor[place] for name, tensor in data.items()}
            experts[one.expert or 0] = one.arrange(codec.decode(mine, one.shape).to(dense), model)
    return torch.stack(experts) if site.expert is not None else experts[0].contiguous()


def read_stored(members: Members, tensors: Mapping[str, Tensor]) -> Stored:
    """What `encode` gave, from a state dict in which `encoded_module` stands."""
    stored = {}
    for codec, (first, *_) in members.items():
        prefix = first.name if first.expert is None else f"{first.parameter}.{first.expert}"
        stored[codec] = {name: tensors[f"{prefix}.{name}"] for name in codec.layout(first.shape)}
    return stored


def refuse_nonfinite(name: str, tensor: Tensor) -> None:
    """Raises EffllmError where a tensor holds NaN or inf."""
    if not bool(torch.isfinite(tensor).all()):
        raise EffllmError(
            f"{name} holds NaN or inf as {tensor.dtype}: the checkpoint is damaged, its training diverged, or the dtype "
            "is too narrow; download it again, or try another dtype"
        )


def encoded_module(module: nn.Module, members: Members, stored: Stored) -> nn.Module:
    """`module` with one of its parameters in encoded form; `members` and `stored` as `by_parameter` and `encode` give."""
    (codec, (site, *_)), *_ = members.items()
    if site.expert is None:
        return codec_layer(module, codec, stored[codec])
    experts = {codec: tuple(cast(int, s.expert) for s in group) for codec, group in members.items()}
    return codec_experts(module, site.parameter.rpartition(".")[2], experts, stored)


def install(model: nn.Module, members: Members, stored: Stored) -> None:
    """Replaces the module of one parameter by `encoded_module`, at every place that is tied to it."""
    (site, *_), *_ = members.values()
    owner = site.parameter.rpartition(".")[0]
    module = encoded_module(model.get_submodule(owner), members, stored)
    if isinstance(module, CodecModule):
        replace(model, site, module)
    else:
        model.set_submodule(owner, module)


def replace(model: nn.Module, site: Site, layer: CodecModule) -> None:
    """Puts `layer` at `site`, and layers that share its tensors at the places tied to it."""
    model.set_submodule(site.name, layer)
    for name in site.tied:
        model.set_submodule(name, codec_layer(model.get_submodule(name), layer.codec, layer.stored(), site.name))
        if hasattr(model, "all_tied_weights_keys"):
            parameters = [key for key, tensor in layer.stored().items() if isinstance(tensor, nn.Parameter)]
            stored = {f"{name}.{key}": f"{site.name}.{key}" for key in parameters}
            for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
                keys = dict(getattr(model, attribute, None) or {})
                keys.pop(f"{name}.weight", None)
                setattr(model, attribute, keys | stored)


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
    model._weight_conversions = None  # type: ignore[assignment]
    return model


def _as_weight(key: str, owner: str, layer: CodecModule) -> str:
    """`owner.codes` (or another stored tensor) as `owner.weight`; other names as they are."""
    return f"{owner}.weight" if key.removeprefix(owner + ".") in layer.stored_names else key


@cache
def return_freed_memory() -> None:
    """Has glibc give freed blocks above 1 MB back at once.

    By default it learns to keep blocks of up to 32 MB, and the temporaries of decoding a model slice by slice then hold
    hundreds of megabytes that nothing uses.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 1 << 20)
