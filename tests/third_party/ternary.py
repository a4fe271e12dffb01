"""Three values a weight."""

import torch
from pydantic import Field

from effllm.method import Codec
from effllm.packing import pack, unpack


class Ternary(Codec):
    """-1, 0 or 1 times a scale for each row, which training may change: 2 + 16 / columns bits per weight.

    Source: Li et al., "Ternary weight networks", arXiv 1605.04711, section 2 (threshold at 0.7 of the mean magnitude).
    """

    paper = "arXiv 1605.04711"
    trainable = ("scale",)
    threshold: float = Field(default=0.7, gt=0, lt=2)

    @classmethod
    def grid(cls, site):
        return [cls(threshold=share) for share in (0.5, 0.7)]

    def encode(self, weight, moments=None):
        weight = weight.float()
        kept = weight.abs() > self.threshold * weight.abs().mean(1, keepdim=True)
        scale = (weight.abs() * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True).clamp_min(1)
        return {"codes": pack((kept * weight.sign() + 1).to(torch.uint8), 2), "scale": scale.half()}

    def decode(self, data, shape):
        return (unpack(data["codes"], 2, shape[1]).float() - 1) * data["scale"]
