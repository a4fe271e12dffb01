"""Matrix products with an encoded weight."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from effllm.layers.base import CodecModule
from effllm.method import Codec


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


def product(x: Tensor, codec: Codec, stored: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """`x W^T` with an encoded W `[rows, columns]`; nothing dense is kept for backward."""
    if torch.is_grad_enabled() and x.requires_grad:
        return cast(Tensor, _Linear.apply(x, codec, shape, tuple(stored), *stored.values()))
    return codec.linear(x, stored, shape)


class CodecProduct(CodecModule):
    """x W^T + b with an encoded W."""

    bias: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        out = product(input, self.codec, self.stored(), self.matrix_shape)
        return out if self.bias is None else out + self.bias


class CodecLinear(CodecProduct, nn.Linear):  # type: ignore[misc, override]
    """A Linear whose weight `[out, in]` is encoded."""

    replaced_class = nn.Linear


class CodecConv1D(CodecProduct, Conv1D):  # type: ignore[misc]
    """A GPT-2 style Conv1D, whose dense weight would be `[in, out]`; stored as `[out, in]`."""

    replaced_class = Conv1D

    def arrange(self, matrix: Tensor) -> Tensor:
        return matrix.t()
