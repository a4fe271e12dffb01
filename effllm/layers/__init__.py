"""Layers that hold a weight in its encoded form.

Each inherits the class that it replaces and shows `.weight` as a tensor of the right shape, dtype and device, which is
decoded where its values are read and cannot be written to.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from effllm.errors import EffllmError
from effllm.layers.base import CodecModule as CodecModule
from effllm.layers.conv import CodecConv1d, CodecConv2d, CodecConv3d
from effllm.layers.embedding import CodecEmbedding as CodecEmbedding
from effllm.layers.linear import CodecConv1D
from effllm.layers.linear import CodecLinear as CodecLinear
from effllm.method import Codec
from effllm.site import cooperates, matrix_shape

LAYERS: dict[type[nn.Module], type[CodecModule]] = {
    Conv1D: CodecConv1D,
    nn.Embedding: CodecEmbedding,
    nn.Conv1d: CodecConv1d,
    nn.Conv2d: CodecConv2d,
    nn.Conv3d: CodecConv3d,
    nn.Linear: CodecLinear,
}


@cache
def codec_class(base: Any) -> type[CodecModule]:
    """The codec layer for modules of class `base`.

    A subclass whose forward calls `super()` keeps what it adds. One with a forward of its own keeps that, and reads the
    decoded weight.
    """
    layer = next(layer for replaced, layer in LAYERS.items() if issubclass(base, replaced))
    if base is layer.replaced_class:
        return layer
    own = {"replaced_class": base}
    if cooperates(base):
        return cast(type[CodecModule], type(f"Codec{base.__name__}", (base, layer), own))
    return cast(type[CodecModule], type(f"Codec{base.__name__}", (layer, base), own | {"forward": base.forward}))


def rebuild(base: type[nn.Module], state: dict[str, Any]) -> CodecModule:
    """A codec layer for class `base` with the attributes `state`."""
    cls = codec_class(base)  # type: ignore[arg-type]
    module = cls.__new__(cls)
    module.__dict__.update(state)
    return module


def codec_layer(module: nn.Module, codec: Codec, stored: dict[str, Tensor], owner: str | None = None) -> CodecModule:
    """`module` with its weight held as `stored`; biases, buffers and other attributes are shared with `module`.

    Where they are the stored tensors of another layer, `owner` is its module path.

    Raises:
        EffllmError: the module has an attribute with the name of a stored tensor.
    """
    taken = [name for name in stored if hasattr(module, name)]
    if taken:
        raise EffllmError(
            f"{type(module).__name__} has an attribute {taken[0]!r} of its own, which {codec.name()} stores a tensor as; "
            "--exclude the layer, choose another method for it, or (who wrote the method) give the tensor another name"
        )
    state = {**module.__dict__, "_parameters": dict(module._parameters), "_buffers": dict(module._buffers)}
    state["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    del state["_parameters"]["weight"]
    layer = rebuild(type(module), state)
    layer.codec, layer.matrix_shape = codec, matrix_shape(module)
    layer.compute_dtype = cast(Tensor, module.weight).dtype
    layer.store(stored, owner)
    return layer


def empty_stored(
    codec: Codec, shape: tuple[int, int], device: torch.device, count: int | None = None
) -> dict[str, Tensor]:
    """Uninitialised stored tensors of a matrix, or of `count` stacked ones, for a loader to fill."""
    leading = () if count is None else (count,)
    layout = codec.layout(shape).items()
    return {name: torch.empty((*leading, *size), dtype=dtype, device=device) for name, (size, dtype) in layout}


def tie(layer: CodecModule, source: CodecModule) -> None:
    """Makes `layer` use the stored tensors of `source` again, after a loader has replaced them."""
    for name in source.stored_names:
        setattr(layer, name, getattr(source, name))
