"""Rotated inputs: a Hadamard matrix spreads the outliers of weights and inputs over many columns, then a codec encodes."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from effllm.method import Codec
from effllm.methods._inputs import Data, MapsInputs
from effllm.methods.quantize import Quantize
from effllm.moments import Moments

if TYPE_CHECKING:
    from effllm.site import Site

LARGEST, SMALLEST = 64, 32  # columns that a block mixes


class Hadamard(MapsInputs):
    """Weights stored for rotated inputs: blocks of columns are mixed by a Hadamard matrix, then encoded by `codec`.

    W x = (W R)(R^T x) with R = diag(s) H: H has Hadamard blocks of the largest power of two, 64 at most, that divides
    the columns, and s_j = +-1 is the Rudin-Shapiro sequence, the parity of the places at which j has two ones in a row, so
    that nothing is stored of R. Inputs are rotated as they come (64 additions and subtractions a number, little beside a
    matrix of thousands of rows), whatever model they come from; so no neighbour has to take up the inverse.

    Rotated columns have no outliers, which a grid represents badly. The metric of the calibration data is rotated with
    them, so error feedback and refinement work as on the plain weight.

    Bits per weight: those of `codec`.

    Source: incoherence processing of QuIP# (Tseng et al., arXiv 2402.04396, section 3); rotations of QuaRot (Ashkboos et
    al., arXiv 2404.00456), which folds what can be folded; blocks that are rotated on the way, as in HIGGS (Malinovskii et
    al., arXiv 2411.17525). The sequence in place of random signs is ours.
    """

    paper: ClassVar[str] = "arXiv 2402.04396"

    @classmethod
    def grid(cls, site: Site) -> list[Codec]:
        if block_size(site.shape[1]) < SMALLEST:
            return []
        return [cls(codec=option) for option in Quantize.grid(site)]

    def fit(self, weight: Tensor, moments: Moments | None) -> Data:
        return {}

    def into(self, weight: Tensor, data: Data) -> Tensor:
        block, signs = rotation(weight.shape[-1], weight.dtype, weight.device)
        turned: Tensor = weight.unflatten(-1, signs.shape) * signs @ block * len(block) ** -0.5
        return turned.flatten(-2)

    def back(self, weight: Tensor, data: Data) -> Tensor:
        block, signs = rotation(weight.shape[-1], weight.dtype, weight.device)
        turned: Tensor = weight.unflatten(-1, signs.shape) @ block * len(block) ** -0.5 * signs
        return turned.flatten(-2)

    def inputs(self, x: Tensor, data: Data) -> Tensor:
        return self.into(x, data)


def block_size(columns: int) -> int:
    """The largest power of two, at most `LARGEST`, that divides `columns`."""
    return min(columns & -columns, LARGEST)


@cache
def rotation(columns: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """The Hadamard block `[size, size]` and the signs `[columns / size, size]`, all 1 or -1: exact in any dtype."""
    block = torch.ones(1, 1)
    while len(block) < block_size(columns):
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    pairs = torch.arange(columns)
    pairs &= pairs >> 1
    parity = ((pairs.unsqueeze(1) >> torch.arange(columns.bit_length())) & 1).sum(1) % 2
    return block.to(device, dtype), (1.0 - 2.0 * parity).view(-1, len(block)).to(device, dtype)
