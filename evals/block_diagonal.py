"""What a block-diagonal metric, which weights of over 16,384 columns get, loses of the order of prices.

    python evals/block_diagonal.py MODEL_FOLDER --width 256 --out results/block_diagonal.json

The Linear weights of the blocks are priced twice: in the metric of all their columns, and in one that knows of no two
columns which lie in different runs of `--width`. Error feedback and prices then see only what lies within a run.

Printed are, for each option, the rank correlation (Spearman) of both prices over the matrices and their ratio; and, of a
budget that is solved with either, the expected KL by the prices in the whole metric.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from allocation import SINGLE, spearman
from peers import write_atomically
from stages import planned

from effllm.allocation.spending import Priced, price_folder
from effllm.checkpoint import Checkpoint, resolve
from effllm.plans import Plan
from effllm.statistics import sums


def priced_by_runs(plan: Plan, checkpoint: Checkpoint, width: int) -> Priced:
    """Prices in block-diagonal metrics; not cached, for their key is that of the whole metrics."""
    kept, home = (sums.WIDEST, sums.WIDTH), os.environ.get("EFFLLM_CACHE")
    with tempfile.TemporaryDirectory(prefix="effllm-block-diagonal-") as scratch:
        os.environ["EFFLLM_CACHE"], sums.WIDEST, sums.WIDTH = scratch, width, width
        try:
            return price_folder(plan, checkpoint)
        finally:
            sums.WIDEST, sums.WIDTH = kept
            os.environ.pop("EFFLLM_CACHE")
            if home is not None:
                os.environ["EFFLLM_CACHE"] = home


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=Path("results/block_diagonal.json"))
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--width", type=int, default=256, help="columns of a run")
    parser.add_argument("--budget", default="3.25bpw")
    arguments = parser.parse_args()
    plan = planned(["quantize"], arguments.samples, budget=arguments.budget)
    checkpoint = Checkpoint.open(resolve(arguments.model))
    whole, runs = price_folder(plan, checkpoint), priced_by_runs(plan, checkpoint, arguments.width)
    assert whole.prices is not None and runs.prices is not None
    wide = [site for site in whole.source.sites if site.name in whole.losses and site.shape[1] > arguments.width]
    found: dict[str, object] = {"width": arguments.width, "matrices": len(wide)}
    for bits, codec in SINGLE.items():
        prices = [[one.prices.losses[site.name][codec.label()] for site in wide] for one in (whole, runs)]
        ratios = sorted(part / all_ for all_, part in zip(*prices, strict=True))
        found[f"{bits} bits"] = {"rank_correlation": spearman(*prices), "ratio": ratios[len(ratios) // 2],
                                 "ratio_smallest": ratios[0], "ratio_largest": ratios[-1]}  # fmt: skip
    found["expected_kl"] = {
        name: whole.predicted(one.solution(one.source.model, checkpoint.stored_bytes, {}).assigned)
        for name, one in (("whole", whole), ("block-diagonal", runs))
    }
    write_atomically(arguments.out, json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
