"""Z-score distribution: how many weights of a block stand out from the rest of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

from torch import Tensor, nn

from effllm.method import Score
from effllm.source import Batch, Source

PART = 1 << 20  # weights held in fp32 at once


class Zd(Score):
    """Z-score distribution (ZD): the share of a block's Linear weights with z > 1; needs no data.

    z_k = (w_k - mean) / sigma over all Linear weights of the block together, one-sided. A *smaller* share means a more
    important block, so the importance returned is minus the share.

    Source: "Layer-Wise Quantization", arXiv 2406.17415, section on the z-score distribution (formula as restated by
    independent re-implementations; the paper's text was not available to us).
    """

    paper: ClassVar[str] = "arXiv 2406.17415"

    def score(self, source: Source, batches: Sequence[Batch]) -> dict[str, float]:
        scores = {}
        for block in source.blocks:
            sites = [site for site in source.sites if site.block == block]
            with source.resident(block):
                tables = {name for name, module in source.model.named_modules() if isinstance(module, nn.Embedding)}
                weights = [site.matrix(source.model) for site in sites if site.name not in tables]
                scores[block] = -_share_above_one(weights)
        return scores


def _share_above_one(weights: list[Tensor]) -> float:
    count = sum(weight.numel() for weight in weights)
    mean = sum(float(part.sum()) for part in _parts(weights)) / count
    variance = sum(float((part - mean).square_().sum()) for part in _parts(weights)) / count
    threshold = mean + variance**0.5
    return sum(int((part > threshold).sum()) for part in _parts(weights)) / count


def _parts(weights: list[Tensor]) -> Iterator[Tensor]:
    """The weights in fp32, a few rows at a time."""
    for weight in weights:
        for rows in weight.split(max(1, PART // weight.shape[1])):
            yield rows.float()
