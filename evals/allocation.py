"""What pricing in expected KL and allocating per matrix buy, measured on one model.

    python evals/allocation.py MODEL_FOLDER --out results/allocation.json

Only the Linear weights of the blocks are quantised, all by `quantize` on the inputs as they are, so that nothing but the
allocation differs. Two tables:

1. single changes: one matrix at 3 or 4 bits, everything else as it is: the predicted KL, with and without the correction
   by probes, beside the measured one, over a spread of matrices; and the rank correlation of both (Spearman);
2. whole plans at equal bytes: per-matrix allocation, uniform bits, blocks ordered by LIM (4 and 2 bits), all encoded in the
   same metric with the same error feedback; and what was predicted of each.

Measured on held-out text that calibration has not seen; standard errors are over windows. Written are OUT (JSON) and OUT
with the suffix .md.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peer_quantizers.reference import Reference
from peers import write_atomically
from stages import planned
from torch import Tensor

from effllm.allocation.spending import Priced, price_folder
from effllm.checkpoint import Checkpoint, resolve
from effllm.data.text import EVALUATION_TEXTS, load_tokenizer, token_windows
from effllm.loading import load
from effllm.method import Codec
from effllm.methods.lim import Lim
from effllm.methods.quantize import Quantize
from effllm.moments import Moments
from effllm.plans import Plan
from effllm.price.probe import probe
from effllm.progress import track
from effllm.site import Site

SINGLE = {3: Quantize(bits=3, group_size=64), 4: Quantize(bits=4, group_size=128)}
BUDGETS = (2.25, 3.25, 4.25, 5.0, 6.0)


def spearman(one: list[float], other: list[float]) -> float:
    """The correlation of ranks."""
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


class Study:
    """One model, priced, with the moments of all its blocks in memory."""

    def __init__(self, folder: Path, plan: Plan, windows: Tensor):
        self.folder, self.windows = folder, windows
        self.checkpoint = Checkpoint.open(folder)
        self.priced: Priced = price_folder(plan, self.checkpoint)
        self.source = self.priced.source
        self.sites: list[Site] = [site for site in self.source.sites if site.name in self.priced.losses]
        everything = {site.name: SINGLE[4] for site in self.sites}
        self.moments: dict[str, Moments] = {}
        for seen in track(self.priced.again(everything, None), "moments"):
            self.moments |= seen.moments
        self.original = load(folder, dtype=torch.float32)
        self.model = load(folder, dtype=torch.float32)
        self.scratch = tempfile.TemporaryDirectory(prefix="effllm-allocation-")
        self.reference = Reference(self.original, windows, Path(self.scratch.name) / "reference.safetensors", "own")

    def decoded(self, site: Site, codec: Codec) -> Tensor:
        """The weight of `site` after encoding, `[rows, columns]`."""
        weight, found = site.matrix(self.original), self.moments[site.name]
        return codec.decode(codec.refine(codec.encode(weight, found), weight, found), site.shape)

    def put(self, assigned: dict[str, Codec]) -> float:
        """Gives the model these codecs' weights; returns the bits per weight."""
        bits = 0
        for site in self.sites:
            target = self.model.get_parameter(site.parameter).data
            if site.name in assigned:
                site.write(self.decoded(site, assigned[site.name]), target, self.model)
                bits += 8 * assigned[site.name].stored_bytes(site.shape)
            else:
                target.copy_(self.original.get_parameter(site.parameter))
                bits += 16 * site.size
        return bits / sum(site.size for site in self.sites)

    def measured(self, assigned: dict[str, Codec]) -> dict[str, Any]:
        """Bits per weight, and KL on the held-out windows, of the model with these codecs."""
        return {"bits_per_weight": self.put(assigned), **self.reference.compare(self.model).figures()}

    def predicted(self, assigned: dict[str, Codec], corrected: bool = True) -> float:
        """Expected KL of these codecs together."""
        prices = self.priced.prices
        assert prices is not None
        chosen = [(site, assigned[site.name]) for site in self.sites if site.name in assigned]
        if corrected:
            return sum(prices.corrected(site, codec) for site, codec in chosen)
        return sum(prices.losses[site.name][codec.label()] for site, codec in chosen)

    def single_changes(self, count: int, tokens: int, at_once: int = 16) -> list[dict[str, Any]]:
        """One row a matrix and width: predicted and measured KL of that change alone."""
        picked = self.sites[:: max(1, len(self.sites) // count)]
        changes = {f"{bits} {site.name}": (site, codec) for bits, codec in SINGLE.items() for site in picked}
        rows = []
        batch = {"input_ids": self.windows.flatten(0, 1)[None, :tokens].reshape(-1, min(tokens, 512))}
        names = list(changes)
        for start in track(range(0, len(names), at_once), "single changes", total=-(-len(names) // at_once)):
            part = {name: changes[name] for name in names[start : start + at_once]}
            units = {name: str(site.block) for name, (site, _) in part.items()}
            measured = probe(self.source, [batch], units, self._changed(part))
            for name, (site, codec) in part.items():
                one = {site.name: codec}
                rows.append(
                    {
                        "site": site.name,
                        "bits": int(name.split()[0]),
                        "priced": self.predicted(one, corrected=False),
                        "corrected": self.predicted(one),
                        "measured": measured[name],
                    }
                )
        return rows

    def _changed(self, changes: dict[str, tuple[Site, Codec]]) -> Callable[[str], dict[str, Tensor]]:
        def changed(name: str) -> dict[str, Tensor]:
            site, codec = changes[name]
            tensor = self.original.get_parameter(site.parameter).detach().clone()
            site.write(self.decoded(site, codec), tensor, self.original)
            return {site.parameter: tensor}

        return changed

    def at(self, budget: float) -> dict[str, Codec]:
        """What the allocator gives at `budget` bits per weight."""
        plan = self.priced.plan.model_copy(update={"budget": f"{budget}bpw"})
        priced = Priced(plan, self.source, self.priced.batches, self.priced.options, self.priced.prices)
        return priced.solution(self.source.model, self.checkpoint.stored_bytes, {}).assigned

    def by_lim(self, lowered: int) -> dict[str, Codec]:
        """4 bits, and 2 for the `lowered` least important blocks by LIM."""
        rank = Lim().score(self.source, self.priced.batches)
        low = set(sorted(rank, key=lambda block: rank[block])[:lowered])
        codecs = Quantize(bits=4, group_size=64), Quantize(bits=2, group_size=64)
        return {site.name: codecs[site.block in low] for site in self.sites}


def rows_of_plans(study: Study) -> list[dict[str, Any]]:
    """Table 2."""
    plans: dict[str, dict[str, Codec]] = {}
    for bits in (2, 3, 4):
        uniform = {site.name: Quantize(bits=bits, group_size=64) for site in study.sites}
        spent = sum(uniform[site.name].stored_bytes(site.shape) for site in study.sites)
        plans[f"uniform {bits} bits"] = uniform
        plans[f"per matrix, bytes of uniform {bits}"] = study.at(8 * spent / sum(site.size for site in study.sites))
    blocks = len({site.block for site in study.sites})
    for lowered in (blocks // 4, blocks // 2):
        ordered = study.by_lim(lowered)
        spent = sum(ordered[site.name].stored_bytes(site.shape) for site in study.sites)
        plans[f"4 bits, {lowered} of {blocks} blocks at 2 by LIM"] = ordered
        plans[f"per matrix, bytes of {lowered} blocks at 2"] = study.at(8 * spent / sum(s.size for s in study.sites))
    for budget in BUDGETS:
        plans[f"per matrix, {budget:g}bpw"] = study.at(budget)
    rows = []
    for name, assigned in plans.items():
        figures = study.measured(assigned)
        rows.append({"plan": name, "predicted_kl": study.predicted(assigned), **figures})
        print(f"{name:45s} {figures['bits_per_weight']:.3f} predicted {rows[-1]['predicted_kl']:.4f} "
              f"measured {figures['kl']:.4f} +- {figures['kl_stderr']:.4f}", flush=True)  # fmt: skip
    return rows


def markdown(singles: list[dict[str, Any]], plans: list[dict[str, Any]]) -> str:
    """Both tables."""
    lines = ["| single changes | matrices | rank correlation, priced | after probes | predicted / measured, all |"]
    lines += ["|---|---|---|---|---|"]
    for bits in SINGLE:
        rows = [row for row in singles if row["bits"] == bits]
        measured, priced, corrected = ([row[key] for row in rows] for key in ("measured", "priced", "corrected"))
        total = sum(corrected) / sum(measured)
        lines.append(
            f"| {bits} bits | {len(rows)} | {spearman(priced, measured):.3f} | {spearman(corrected, measured):.3f} "
            f"| {total:.2f} |"
        )
    lines += ["", "| plan | bits per weight | predicted KL | measured KL | ratio | perplexity | top-1 |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in plans:
        lines.append(
            f"| {row['plan']} | {row['bits_per_weight']:.3f} | {row['predicted_kl']:.4f} | {row['kl']:.4f} ± "
            f"{row['kl_stderr']:.4f} | {row['predicted_kl'] / row['kl']:.2f} | {row['perplexity']:.2f} "
            f"| {100 * row['top1_agreement']:.1f} % |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=Path("results/allocation.json"))
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--windows", type=int, default=16, help="held-out windows of 512 tokens")
    parser.add_argument("--matrices", type=int, default=42, help="of the single changes")
    parser.add_argument("--tokens", type=int, default=1024, help="held-out tokens of the single changes")
    arguments = parser.parse_args()
    folder = resolve(arguments.model)
    windows = token_windows(load_tokenizer(folder), ["default"], arguments.windows, 512, packaged=EVALUATION_TEXTS)
    study = Study(folder, planned(["quantize"], arguments.samples), windows)
    singles = study.single_changes(arguments.matrices, arguments.tokens)
    plans = rows_of_plans(study)
    table = markdown(singles, plans)
    write_atomically(arguments.out, json.dumps({"singles": singles, "plans": plans}, indent=2) + "\n")
    write_atomically(arguments.out.with_suffix(".md"), table)
    assert all(math.isfinite(row["kl"]) for row in plans)
    print(table)


if __name__ == "__main__":
    main()
