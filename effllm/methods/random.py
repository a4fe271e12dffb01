"""A control: blocks in random order."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar

from effllm.method import Score
from effllm.source import Batch, Source


class Random(Score):
    """Blocks in an order drawn from `seed`: what an importance score must beat."""

    paper: ClassVar[str] = "control"
    seed: int = 0

    def score(self, source: Source, batches: Sequence[Batch]) -> dict[str, float]:
        generator = random.Random(self.seed)
        return {block: generator.random() for block in source.blocks}
