"""A control: layer input modification the wrong way round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from effllm.methods.lim import Lim
from effllm.source import Batch, Source


class Reversed(Lim):
    """LIM reversed: the blocks that change their input least count as most important. Should lose to `random`."""

    paper: ClassVar[str] = "control"

    def score(self, source: Source, batches: Sequence[Batch]) -> dict[str, float]:
        return {block: -importance for block, importance in super().score(source, batches).items()}
