"""The tables of `layerwise.py` in Markdown, and how many blocks can be lowered before quality breaks."""

from __future__ import annotations

from typing import Any

from layerwise_rows import PAIRS, SEEDS

PERPLEXITY_LIMIT = 1.10  # of the high-width model
KL_LIMIT = 0.1  # nats a token above the high-width model


def within(row: dict[str, Any], top: dict[str, Any]) -> bool:
    """Whether a row of the sweep is still as good as the high-width model, by the limits above."""
    return bool(row["perplexity"] <= PERPLEXITY_LIMIT * top["perplexity"] and row["kl"] <= top["kl"] + KL_LIMIT)


def sweep_of(rows: list[dict[str, Any]], high: int, low: int, order: str) -> list[dict[str, Any]]:
    """The rows of one sweep from no lowered block to all."""
    ends = [next(r for r in rows if r["high_low_bits"] == [bits, bits] and not r["dropped"]) for bits in (high, low)]
    inner = [r for r in rows if r["high_low_bits"] == [high, low] and r["order"] == order]
    return [ends[0], *sorted(inner, key=lambda row: row["lowered"]), ends[1]]


def breaking_point(sweep: list[dict[str, Any]], blocks: int) -> int:
    """The largest measured count up to which every measured count is within the limits."""
    largest = 0
    for index, row in enumerate(sweep):
        if not within(row, sweep[0]):
            break
        largest = blocks if index == len(sweep) - 1 else row["lowered"] if index else 0
    return largest


def markdown(rows: list[dict[str, Any]], blocks: int, note: str) -> str:
    """The three tables."""
    head = (
        "| | bits a weight | MB of blocks | perplexity | KL, nats a token | top-1 | nll minus {} |\n" + "|---" * 7 + "|"
    )

    def line(row: dict[str, Any]) -> str:
        key = next((key for key in ("nll_minus_lim", "nll_minus_lowered") if key in row), None)
        against = "" if key is None else f"{row[key]:+.3f} ± {row[f'{key}_stderr']:.3f}"
        return (
            f"| {row['variant']} | {row['bits_per_weight']:.3f} | {row['block_bytes'] / 1e6:.1f} "
            f"| {row['perplexity']:.2f} ± {row['perplexity_stderr']:.2f} | {row['kl']:.4f} ± {row['kl_stderr']:.4f} "
            f"| {row['top1_agreement']:.3f} | {against} |"
        )

    def part(table: str) -> list[dict[str, Any]]:
        return [row for row in rows if row["table"] == table]

    lines = [note, "", "**1. Widths and orders**", "", head.format("LIM"), *map(line, part("main"))]
    lines += [
        "",
        "**2. Lowering bits against dropping blocks**, least important by LIM first",
        "",
        head.format("lowering"),
    ]
    lines += [*map(line, part("drop"))]
    lines += [
        "",
        "**3. Blocks lowered before quality breaks**: perplexity within 10 % of the high-width model, and KL at most "
        f"{KL_LIMIT} nats a token above its KL; the largest n up to which all measured n hold",
        "",
    ]
    lines += [f"| pair | LIM | random, seeds {', '.join(map(str, SEEDS))} |", "|---|---|---|"]
    swept = part("sweep")
    for high, low in PAIRS:
        found = [breaking_point(sweep_of(swept, high, low, order), blocks) for order in orders()]
        lines.append(f"| {high}/{low} | {found[0]} of {blocks} | {', '.join(map(str, found[1:]))} |")
    for high, low in PAIRS:
        lim, mean = sweep_of(swept, high, low, "lim"), sweep_of(swept, high, low, "random")
        lines += ["", f"{high}/{low}, perplexity (KL); random is the mean of {len(SEEDS)} orders, in nats:", ""]
        lines += ["| n lowered | bits a weight | LIM | random | nll of random minus LIM |", "|---|---|---|---|---|"]
        for index, (one, other) in enumerate(zip(lim, mean, strict=True)):
            n = 0 if index == 0 else blocks if index == len(lim) - 1 else one["lowered"]
            gap = (
                f"{other['nll_minus_lim']:+.3f} ± {other['nll_minus_lim_stderr']:.3f}"
                if "nll_minus_lim" in other
                else ""
            )
            lines.append(f"| {n} | {one['bits_per_weight']:.3f} | {one['perplexity']:.2f} ({one['kl']:.3f}) | "
                         f"{other['perplexity']:.2f} ({other['kl']:.3f}) | {gap} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def orders() -> list[str]:
    """The orders of a sweep."""
    return ["lim", *(f"random:seed={seed}" for seed in SEEDS)]
