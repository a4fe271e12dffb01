"""Layers that hold a weight in its encoded form.

Each inherits the class that it replaces and shows `.weight` as metadata: shape, dtype and device are right, the values
are NaN, so that whatever reads metadata works and whatever would compute with it fails loudly. Stored integers are frozen
parameters, which loaders and offloading treat as they treat any weight. Stored floats are buffers: `model.dtype` is the
dtype of the first float parameter, and a scale must not decide it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from effllm.method import Codec
from effllm.site import cooperates, matrix_shape


class CodecModule(nn.Module):
    """What the codec layers share: the codec, the matrix's shape and the stored tensors."""

    codec: Codec
    matrix_shape: tuple[int, int]
    compute_dtype: torch.dtype
    stored_names: tuple[str, ...]
    replaced_class: type[nn.Module]

    def stored(self) -> dict[str, Tensor]:
        """The stored tensors by name, as `Codec.encode` returned them."""
        return {name: getattr(self, name) for name in self.stored_names}

    @property
    def weight(self) -> Tensor:
        """Shape, dtype and device of the dense weight; NaN everywhere, stride 0. `decoded()` has the values."""
        rows, columns = self.matrix_shape
        shape = (columns, rows) if isinstance(self, Conv1D) else (rows, columns)
        device = getattr(self, self.stored_names[0]).device
        metadata = torch.full((), float("nan"), dtype=self.compute_dtype, device=device).expand(shape)
        metadata._is_hf_initialized = True  # type: ignore[attr-defined]
        return metadata

    def decoded(self) -> Tensor:
        """The dense weight in the layer's dtype, laid out as in the class that this layer replaces."""
        weight = self.codec.decode(self.stored(), self.matrix_shape).to(self.compute_dtype)
        return weight.t().contiguous() if isinstance(self, Conv1D) else weight

    def dense(self, weight: nn.Parameter) -> nn.Module:
        """The layer of the class that this one replaces, with `weight` (see `decoded`) in place of the stored tensors."""
        module = self.replaced_class.__new__(self.replaced_class)
        dropped = {"codec", "matrix_shape", "compute_dtype", "stored_names"}
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
            as_integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
            return fn(tensor.data.view(as_integers)).view(dtype)

        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        super()._apply(move, recurse)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.replaced_class, self.__dict__)


class _Linear(torch.autograd.Function):
    """`codec.linear` that keeps only the packed tensors for backward and decodes them again there."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, codec: Codec, shape: tuple[int, int], names: tuple[str, ...], *stored: Tensor
    ) -> Any:
        ctx.codec, ctx.shape, ctx.names = codec, shape, names
        ctx.save_for_backward(*stored)
        return codec.linear(x, dict(zip(names, stored, strict=True)), shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        weight = ctx.codec.decode(dict(zip(ctx.names, ctx.saved_tensors, strict=True)), ctx.shape)
        return (gradient @ weight.to(gradient.dtype), None, None, None, *([None] * len(ctx.names)))


class CodecProduct(CodecModule):
    """x W^T + b with an encoded W."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        stored = self.stored()
        if torch.is_grad_enabled() and input.requires_grad:
            out = _Linear.apply(input, self.codec, self.matrix_shape, tuple(stored), *stored.values())
        else:
            out = self.codec.linear(input, stored, self.matrix_shape)
        return cast(Tensor, out if self.bias is None else out + self.bias)


class CodecLinear(CodecProduct, nn.Linear):  # type: ignore[misc, override]
    """A Linear whose weight `[out, in]` is encoded."""

    replaced_class = nn.Linear


class CodecConv1D(CodecProduct, Conv1D):  # type: ignore[misc]
    """A GPT-2 style Conv1D, whose dense weight would be `[in, out]`; stored as `[out, in]`."""

    replaced_class = Conv1D


class CodecEmbedding(CodecModule, nn.Embedding):  # type: ignore[misc, override]
    """An Embedding `[entries, width]` that decodes only the rows looked up."""

    replaced_class = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        rows = self.codec.decode_rows(self.stored(), input.reshape(-1), self.matrix_shape)
        return rows.to(self.compute_dtype).view(*input.shape, -1)


@cache
def codec_class(base: Any) -> type[CodecModule]:
    """The codec layer for modules of class `base`. A subclass whose forward calls `super()` keeps what it adds."""
    layer = (
        CodecConv1D if issubclass(base, Conv1D) else CodecEmbedding if issubclass(base, nn.Embedding) else CodecLinear
    )
    if base is layer.replaced_class:
        return layer
    bases = (base, layer) if cooperates(base) else (layer, base)
    return cast(type[CodecModule], type(f"Codec{base.__name__}", bases, {"replaced_class": base}))


def _rebuild(base: type[nn.Module], state: dict[str, Any]) -> CodecModule:
    cls = codec_class(base)  # type: ignore[arg-type]
    module = cls.__new__(cls)
    module.__dict__.update(state)
    return module


def codec_layer(module: nn.Module, codec: Codec, stored: dict[str, Tensor], owner: bool = True) -> CodecModule:
    """`module` with its weight held as `stored`; biases, buffers and other attributes are shared with `module`.

    Where another layer is the `owner` of the stored tensors, this one uses the very same, and saves none of its own.
    """
    state = {**module.__dict__, "_parameters": dict(module._parameters), "_buffers": dict(module._buffers)}
    state["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
    del state["_parameters"]["weight"]
    layer = _rebuild(type(module), state)
    layer.codec, layer.matrix_shape, layer.stored_names = codec, matrix_shape(module), tuple(stored)
    layer.compute_dtype = cast(Tensor, module.weight).dtype
    for name, tensor in stored.items():
        if tensor.is_floating_point():
            layer.register_buffer(name, tensor, persistent=owner)
        else:
            parameter = nn.Parameter(tensor, requires_grad=False) if owner else cast(nn.Parameter, tensor)
            layer.register_parameter(name, parameter)
    return layer


def empty_codec_layer(module: nn.Module, codec: Codec) -> CodecModule:
    """`codec_layer` with uninitialised stored tensors on the device of `module`, for a loader to fill."""
    layout = codec.layout(matrix_shape(module))
    device = cast(Tensor, module.weight).device
    return codec_layer(
        module, codec, {name: torch.empty(size, dtype=dtype, device=device) for name, (size, dtype) in layout.items()}
    )


def tie(layer: CodecModule, source: CodecModule) -> None:
    """Makes `layer` use the stored tensors of `source` again, after a loader has replaced them."""
    for name in source.stored_names:
        setattr(layer, name, getattr(source, name))
