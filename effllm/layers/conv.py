"""Convolutions with an encoded kernel, grouped, dilated and depthwise ones alike."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from effllm.layers.base import CodecModule


class CodecConv(CodecModule):
    """A convolution whose kernel `[out, in / groups, *kernel_size]` is encoded as the matrix `[out, rest]`.

    The kernel is decoded as a whole for each forward, and autograd keeps it until backward.
    """

    bias: Tensor | None

    def arrange(self, matrix: Tensor) -> Tensor:
        module = cast(Any, self)
        return matrix.reshape(module.out_channels, module.in_channels // module.groups, *module.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, self)._conv_forward(input, self.decoded(), self.bias))


class CodecConv1d(CodecConv, nn.Conv1d):  # type: ignore[misc, override]
    """A Conv1d with an encoded kernel."""

    replaced_class = nn.Conv1d


class CodecConv2d(CodecConv, nn.Conv2d):  # type: ignore[misc, override]
    """A Conv2d with an encoded kernel."""

    replaced_class = nn.Conv2d


class CodecConv3d(CodecConv, nn.Conv3d):  # type: ignore[misc, override]
    """A Conv3d with an encoded kernel."""

    replaced_class = nn.Conv3d
