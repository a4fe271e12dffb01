"""Layer input modification: how much a block changes what passes through it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effllm.method import Score
from effllm.source import Batch, Source


class Lim(Score):
    """Layer input modification (LIM): minus the cosine between the input and the output of a decoder block.

    LIM_i = -(I_i . O_i) / (|I_i| |O_i|), in fp32; larger = the block changes its input more = more important.

    `reduce: token` takes the cosine of every token and averages over tokens and texts; `reduce: sequence` flattens each
    text to one vector first, so that tokens with large hidden states count more. Descriptions of the paper differ on
    this, and its text was not available to us. On Gemma-3-270M the two order the blocks differently, and `sequence` is
    the better at 3 bits on average (docs/layerwise.md).

    Source: "Layer-Wise Quantization", arXiv 2406.17415, section on layer input modification (formula as restated by
    independent re-implementations).

    Patches of an image and frames of speech count as tokens do, and so do the positions of a convolution's map, with its
    channels as the vector. A block that changes the shape of what passes through replaces its input: its cosine counts as
    0, which puts it above blocks that keep theirs. This extension to vision and speech is ours.
    """

    paper: ClassVar[str] = "arXiv 2406.17415"
    needs_data: ClassVar[bool] = True
    reduce: Literal["token", "sequence"] = "token"

    def score(self, source: Source, batches: Sequence[Batch]) -> dict[str, float]:
        totals: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for block, before, after in source.stream(batches):
            is_map = before.dim() == 4 and _has_conv2d(source.model.get_submodule(block))
            cosine = self._cosine(before.float(), after.float(), dim=1 if is_map else -1)
            totals[block] = totals.get(block, torch.zeros(())) + cosine.sum().cpu()
            counts[block] = counts.get(block, 0) + cosine.numel()
        return {block: -float(total) / counts[block] for block, total in totals.items()}

    def _cosine(self, before: Tensor, after: Tensor, dim: int) -> Tensor:
        if before.shape != after.shape:
            return torch.zeros(1)
        if self.reduce == "sequence":
            return F.cosine_similarity(before.flatten(1), after.flatten(1), dim=-1)
        return F.cosine_similarity(before, after, dim=dim)


def _has_conv2d(block: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in block.modules())
