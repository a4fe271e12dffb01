"""A control: blocks in random order."""

from __future__ import annotations

import random
from typing import ClassVar

from torch import Tensor

from effllm.method import Score
from effllm.source import Source


class Random(Score):
    """Blocks in an order drawn from `seed`: what an importance score must beat."""

    paper: ClassVar[str] = "control"
    seed: int = 0

    def score(self, source: Source, batches: list[Tensor]) -> dict[str, float]:
        generator = random.Random(self.seed)
        return {block: generator.random() for block in source.blocks}
