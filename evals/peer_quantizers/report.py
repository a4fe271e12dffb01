"""The rows of `evals/peers.py` as a Markdown table and as a plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from effllm.measure.result import standard_error

Row = dict[str, Any]


def difference(row: Row, other: Row) -> tuple[float, float]:
    """KL of `row` minus that of `other`, and the standard error of it, paired by window."""
    gap = Tensor(row["window_kl"]).double() - Tensor(other["window_kl"]).double()
    return float(gap.mean()), standard_error(gap)


def rival(row: Row, rows: list[Row]) -> Row | None:
    """effllm's largest row that is no larger than a peer's."""
    found = [other for other in rows if "budget" in other and "bits" in other and other["bits"] <= row["bits"]]
    return max(found, key=lambda other: other["bits"], default=None)


def table(rows: list[Row]) -> str:
    """The rows as Markdown, by bits; failed ones last."""
    lines = [
        "| bits | compressor | KL ± se | perplexity ± se | top-1 % | s | CPU s | peak MB | effllm at these bits or fewer |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted((row for row in rows if "bits" in row), key=lambda row: row["bits"]):
        other = None if "budget" in row else rival(row, rows)
        against = "{:+.4f} ± {:.4f}".format(*difference(other, row)) + f" ({other['bits']:.3f} bits)" if other else ""
        lines.append(
            f"| {row['bits']:.3f} | {row['name']} | {row['kl']:.4f} ± {row['kl_stderr']:.4f} "
            f"| {short(row['perplexity'])} ± {short(row['perplexity_stderr'])} | {100 * row['top1_agreement']:.1f} ± "
            f"{100 * row['top1_agreement_stderr']:.1f} | {row['seconds']:.0f} | {row['cpu_seconds']:.0f} "
            f"| {row['peak_memory_bytes'] / 1e6:.0f} | {against} |"
        )
    lines += [f"| | {row['name']} | failed: {row['error']} | | | | | | |" for row in rows if "error" in row]
    return "\n".join(lines)


def short(value: float) -> str:
    """A figure that may be anything from 0.01 to a billion."""
    return f"{value:.2f}" if value < 1e4 else f"{value:.0e}"


def plot(rows: list[Row], path: Path) -> None:
    """KL, on a log scale, over bits."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("the plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(13, 8))
    for ours, label in ((False, "peers"), (True, "effllm")):
        chosen = sorted(
            (row for row in rows if "bits" in row and ("budget" in row) == ours), key=lambda row: row["bits"]
        )
        if not chosen:
            continue
        x, y = [row["bits"] for row in chosen], [max(row["kl"], math.ulp(1.0)) for row in chosen]
        errors = [row["kl_stderr"] for row in chosen]
        axes.errorbar(x, y, yerr=errors, fmt="o-" if ours else "s", label=label, capsize=2)
        for place, row in enumerate(() if ours else chosen):
            offset = (4, (5, -11, 15, -21)[place % 4])  # neighbours lie at about one size
            axes.annotate(row["name"], (row["bits"], row["kl"]), offset, textcoords="offset points", fontsize=7)
    axes.set(yscale="log", xlabel="bits per weight of the decoder's Linears", ylabel="KL to the original, nats a token")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
