"""Scaled inputs: columns that matter more are enlarged before another codec rounds them, and their inputs made smaller."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from effllm.method import Codec
from effllm.methods._inputs import Data, MapsInputs
from effllm.methods.quantize import Quantize
from effllm.moments import Moments

if TYPE_CHECKING:
    from effllm.site import Site

SMALLEST, LARGEST = 2.0**-8, 2.0**8


class Awq(MapsInputs):
    """Weights stored for scaled inputs: column j is multiplied by s_j before `codec` rounds it, its input divided by it.

    s_j = (A_jj)^(exponent / 2), A being the metric of the calibration data: so columns of large inputs, weighted by their
    gradients' energy, have a smaller error relative to the others. The scales have a geometric mean of 1 and are stored in
    fp16, `input_scale` `[columns]`. Without data all are 1.

    Where weights are rounded to nearest this helps much; error feedback finds nearly all of it without scales, so no preset
    uses it.

    Bits per weight: those of `codec`, and 16 / rows.

    Source: AWQ (Lin et al., arXiv 2306.00978, section 3.2), which takes s from the mean size of the inputs, searches the
    exponent by the layer's output error, and folds the scales into the layer before. Here the exponent is an option that
    prices decide on, and the scales stay with the layer, so that it works in any model.
    """

    paper: ClassVar[str] = "arXiv 2306.00978"
    maps: ClassVar[tuple[str, ...]] = ("input_scale",)
    exponent: Annotated[float, Field(gt=0, le=1, description="1 makes all columns matter alike")] = 0.25

    @classmethod
    def grid(cls, site: Site) -> list[Codec]:
        return [cls(codec=option, exponent=exponent) for exponent in (0.125, 0.25) for option in Quantize.grid(site)]

    def fit(self, weight: Tensor, moments: Moments | None) -> Data:
        columns = weight.shape[1]
        if moments is None:
            return {"input_scale": torch.ones(columns, dtype=torch.float16, device=weight.device)}
        energy = moments.solving.dense.diagonal()
        energy = energy.clamp_min(energy.mean() * 1e-6 + torch.finfo(torch.float32).tiny)
        sizes = energy.pow(self.exponent / 2)
        return {"input_scale": (sizes / sizes.log().mean().exp()).clamp(SMALLEST, LARGEST).half()}

    def into(self, weight: Tensor, data: Data) -> Tensor:
        return weight * data["input_scale"]

    def back(self, weight: Tensor, data: Data) -> Tensor:
        return weight / data["input_scale"]

    def inputs(self, x: Tensor, data: Data) -> Tensor:
        return x / data["input_scale"]
