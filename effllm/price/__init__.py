"""What storing a weight in a certain way is expected to cost, in nats per token: one formula for every codec."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effllm.method import Codec
from effllm.moments import Moments

FEWEST, MOST, SHARE = 64, 256, 32  # rows that are priced: one of 32, but no fewer and no more than these


def price(
    codecs: Sequence[Codec], weight: Tensor, moments: Moments, rows: tuple[Tensor, Tensor] | None = None
) -> list[float]:
    """Expected KL, nats per token (or image), of storing `weight` `[rows, columns]` by each of `codecs`.

    The error of what is decoded, in the metric of `moments`. `rows` are those to look at and how many each stands for, as
    `sample_rows` gives them; all by default.
    """
    index, counts = rows or (torch.arange(len(weight), device=weight.device), torch.ones(len(weight)))
    part, of_part = weight[index], moments.of(index)
    alike: dict[tuple[type[Codec], bool], list[Codec]] = {}
    for codec in codecs:
        alike.setdefault((type(codec), codec.by_rows), []).append(codec)
    found: dict[Codec, float] = {}
    for (cls, by_rows), members in alike.items():
        given, seen = (part, of_part) if by_rows else (weight, moments)
        for codec, data in zip(members, cls.encode_each(members, given, seen), strict=True):
            decoded = codec.decode(data, (len(given), given.shape[1])).float()
            errors = (decoded if by_rows else decoded[index]) - part.float()
            found[codec] = expected(errors, moments, (index, counts))
    return [found[codec] for codec in codecs]


def expected(errors: Tensor, moments: Moments, rows: tuple[Tensor, Tensor]) -> float:
    """Expected KL, nats per token (or image), of `errors` `[n, columns]` in the rows of a weight that stand for all."""
    index, counts = rows
    return float(moments.costs(errors, index).cpu() @ counts)


def relative_error(codec: Codec, weight: Tensor) -> float:
    """What stands for the price where there are no data: the squared error as a share of the squared weights.

    That every matrix's relative error counts alike is the assumption behind the linearity theorem of HIGGS (arXiv
    2411.17525) with equal coefficients. It orders options; it is no KL.
    """
    if codec.by_rows:
        weight = weight[torch.linspace(0, len(weight) - 1, min(len(weight), MOST)).long().to(weight.device)]
    weight = weight.float()
    decoded = codec.decode(codec.encode(weight), (len(weight), weight.shape[1]))
    return float((decoded.float() - weight).square().sum() / weight.square().sum().clamp_min(1e-30))


def sample_rows(weight: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
    """Rows of `weight` that stand for all: int64 `[n]`, and fp32 `[n]`, how many rows each stands for.

    Systematic sampling with chances in proportion to what a row would cost if it were lost whole: the estimate (Horvitz
    and Thompson's) has no bias, and rows that matter most are certain to be looked at.
    """
    count = min(len(weight), max(FEWEST, min(MOST, len(weight) // SHARE)))
    size = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square() * moments.importance
    size = size.cpu().clamp_min(1e-6 * float(size.mean()) + 1e-30)
    certain = torch.zeros(len(size), dtype=torch.bool)
    while True:
        chance = torch.where(certain, 1.0, size * (count - certain.sum()) / size[~certain].sum())
        if not (chance[~certain] > 1).any():
            break
        certain |= chance > 1
    ticks = (chance.cumsum(0) + 0.5).floor()
    index = torch.nonzero(torch.diff(ticks, prepend=torch.zeros(1)) > 0).flatten()
    return index.to(weight.device), 1 / chance[index]
