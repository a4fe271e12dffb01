"""Layer input modification: how much a block changes what passes through it."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from effllm.method import Score
from effllm.source import Source


class Lim(Score):
    """Layer input modification (LIM): minus the cosine between the input and the output of a decoder block.

    LIM_i = -(I_i . O_i) / (|I_i| |O_i|), in fp32; larger = the block changes its input more = more important.

    `reduce: token` takes the cosine of every token and averages over tokens and texts; `reduce: sequence` flattens each
    text to one vector first, so that tokens with large hidden states count more. Descriptions of the paper differ on
    this, and its text was not available to us. On Gemma-3-270M the two order the blocks differently, and `sequence` is
    the better at 3 bits on average (docs/layerwise.md).

    Source: "Layer-Wise Quantization", arXiv 2406.17415, section on layer input modification (formula as restated by
    independent re-implementations).
    """

    paper: ClassVar[str] = "arXiv 2406.17415"
    needs_data: ClassVar[bool] = True
    reduce: Literal["token", "sequence"] = "token"

    def score(self, source: Source, batches: list[Tensor]) -> dict[str, float]:
        totals: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        for block, before, after in source.stream(batches):
            inputs, outputs = before.float(), after.float()
            if self.reduce == "sequence":
                inputs, outputs = inputs.flatten(1), outputs.flatten(1)
            cosine = F.cosine_similarity(inputs, outputs, dim=-1)
            totals[block] = totals.get(block, torch.zeros(())) + cosine.sum().cpu()
            counts[block] = counts.get(block, 0) + cosine.numel()
        return {block: -float(total) / counts[block] for block, total in totals.items()}
