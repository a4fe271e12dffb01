"""The rows of `layerwise.py`: what is done to the model in each, and in which tables it stands."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from effllm.plans import Plan, load_plan

SEEDS = (0, 1, 2)
PAIRS = ((8, 4), (4, 2))


@dataclass(frozen=True)
class Variant:
    """One row: what is done to the model, and in which tables it appears."""

    name: str
    plan: Plan | None = None
    """None leaves the weights as they are."""
    dropped: int = 0
    """How many of the least important blocks by LIM are removed."""
    order: str = ""
    pair: tuple[int, int] | None = None
    """High and low bits; equal in a uniform row."""
    lowered: int = 0
    tables: tuple[str, ...] = field(default=(), compare=False)


def mixed(order: str, high: int, low: int, lowered: int, blocks: int, group: int) -> Plan:
    """The plan that gives `lowered` of `blocks` blocks `low` bits, the others `high`; the blocks' Linears only."""
    kept = {"exclude": ["embeddings", "head"]}
    codecs = [f"quantize:bits={bits},group_size={group}" for bits in (high, low)]
    if lowered in (0, blocks) or high == low:
        return load_plan({**kept, "steps": [{"sites": ["blocks"], "use": codecs[lowered == blocks]}]})
    average = high - (high - low) * lowered / blocks
    ordered = {"order": order, "high": codecs[0], "low": codecs[1], "average_bits": average}
    return load_plan({**kept, "steps": [{"sites": ["blocks"], **ordered}]})


def variants(blocks: int, group: int, quick: bool) -> list[Variant]:
    """Every row of the three tables; a row that several tables show is one variant."""
    found: dict[tuple[Any, ...], Variant] = {}

    def add(table: str, name: str, high: int, low: int, lowered: int, order: str = "", dropped: int = 0) -> None:
        order = order if 0 < lowered < blocks else ""
        high, low = (low, low) if lowered == blocks else (high, high) if lowered == 0 else (high, low)
        key = (high, low, lowered if order else 0, order, dropped)
        tables = (*found[key].tables, table) if key in found else (table,)
        plan = mixed(order or "lim", high, low, lowered, blocks, group)
        found[key] = Variant(
            found[key].name if key in found else name, plan, dropped, order, (high, low), lowered, tables
        )

    for bits in (8, 4, 3):
        add("main", f"uniform {bits}", bits, bits, 0)
    randoms = {f"random:seed={seed}": f"random, seed {seed}" for seed in SEEDS}
    orders = {"lim": "LIM", "lim:reduce=sequence": "LIM, a vector a text", "zd": "ZD", "reversed": "reversed LIM"}
    for average in (3.5, 3.0):
        lowered = blocks - load_plan(
            {"steps": [{"sites": ["blocks"], "order": "lim", "high": "quantize:bits=4", "low": "quantize:bits=2",
                        "average_bits": average}]}
        ).steps[0].high_blocks(blocks)  # fmt: skip
        for order, label in (orders | randoms).items():
            add("main", f"4/2, {lowered} of {blocks} at 2: {label}", 4, 2, lowered, order)
    grid = counts(blocks, quick)
    for high, low in PAIRS:
        for n in grid:
            for order, label in {"lim": "LIM", **randoms}.items():
                add("sweep", f"{high}/{low}, {n} of {blocks} at {low}: {label}", high, low, n, order)
        for n in drops(grid, blocks):
            add("drop", f"{high}/{low}, {n} of {blocks} at {low}: LIM", high, low, n, "lim")
            add("drop", f"uniform {high}, {n} of {blocks} dropped: LIM", high, high, 0, dropped=n)
    return [Variant("original", tables=("main",)), *found.values()]


def counts(blocks: int, quick: bool) -> list[int]:
    """How many blocks the sweep lowers: every count up to a third, then every second one, and all."""
    dense = range(blocks // 3 + 1)
    return sorted({*dense, *range(0, blocks, 2), blocks}) if not quick else sorted({0, 1, blocks // 2, blocks})


def drops(grid: list[int], blocks: int) -> list[int]:
    """The counts of table 2: about an eighteenth, a ninth, a quarter and a half of the blocks."""
    inner = [n for n in grid if 0 < n < blocks]
    return sorted({min(inner, key=lambda n: abs(n - blocks * share)) for share in (1 / 18, 1 / 9, 1 / 4, 1 / 2)})
