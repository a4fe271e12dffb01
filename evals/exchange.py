"""Whether exchanging options by measured KL, after the solve, beats what prices alone decide.

    python evals/exchange.py MODEL_FOLDER --out results/exchange.json

The Linear weights of the blocks are solved for a budget. Then, in the compressed model, every `--every`th matrix is given
the next smaller and the next larger option, one at a time, and what the KL to the original becomes is measured on a few
windows. Prices come from the original model; these measurements from the one that everything else has lowered already.

Printed are the rank correlation of expected and measured changes, and the KL on other windows before and after an exchange:
the budget is solved again with the prices of each matrix scaled as its changes were measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from allocation import Study, spearman
from peer_quantizers.reference import Reference
from peers import write_atomically
from torch import Tensor

from effllm.allocation.spending import Priced
from effllm.checkpoint import resolve
from effllm.data.text import EVALUATION_TEXTS, load_tokenizer, token_windows
from effllm.method import Codec
from effllm.plans import load_plan
from effllm.progress import track
from effllm.site import Site

MOST = 4.0  # times that a measurement may change a price, and one over it


def neighbours(study: Study, site: Site, chosen: Codec) -> list[Codec]:
    """The next smaller and the next larger option on the front of bytes and prices, where there are such."""
    options = study.priced.options[site.name]
    priced = sorted(zip([codec.stored_bytes(site.shape) for codec in options], study.priced.losses[site.name], options,
                        strict=True), key=lambda one: one[:2])  # fmt: skip
    front = [one for place, one in enumerate(priced) if all(one[1] < other[1] for other in priced[:place])]
    codecs = [codec for *_, codec in front]
    place = codecs.index(chosen)
    return codecs[max(0, place - 1) : place] + codecs[place + 1 : place + 2]


def changes(study: Study, assigned: dict[str, Codec], every: int) -> list[dict[str, Any]]:
    """Expected and measured change of the KL for each change of one matrix."""
    before, rows = study.measured(assigned)["kl"], []
    for site in track(study.sites[::every], "changes"):
        chosen, target = assigned[site.name], study.model.get_parameter(site.parameter).data
        own: Tensor = target.clone()
        for codec in neighbours(study, site, chosen):
            site.write(study.decoded(site, codec), target, study.model)
            measured = study.reference.compare(study.model).figures()["kl"] - before
            expected = study.predicted({site.name: codec}) - study.predicted({site.name: chosen})
            rows.append({"site": site.name, "from": chosen.label(), "to": codec.label(),
                         "expected": expected, "measured": measured})  # fmt: skip
        target.copy_(own)
    return rows


def exchanged(study: Study, assigned: dict[str, Codec], rows: list[dict[str, Any]], budget: str) -> dict[str, Codec]:
    """What the budget buys where prices are scaled by measured over expected change, matrix by matrix."""
    losses = {name: list(values) for name, values in study.priced.losses.items()}
    for site in study.sites:
        own = [row for row in rows if row["site"] == site.name]
        if own:
            factor = sum(abs(row["measured"]) for row in own) / sum(abs(row["expected"]) for row in own)
            losses[site.name] = [loss * min(max(factor, 1 / MOST), MOST) for loss in losses[site.name]]
    plan = study.priced.plan.model_copy(update={"budget": budget})
    priced = Priced(plan, study.source, study.priced.batches, study.priced.options, study.priced.prices)
    priced.__dict__["losses"] = losses
    return priced.solution(study.source.model, study.checkpoint.stored_bytes, {}).assigned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=Path("results/exchange.json"))
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--windows", type=int, nargs=2, default=[4, 16], help="to measure changes on, and the result")
    parser.add_argument("--every", type=int, default=2, help="one of so many matrices is changed")
    parser.add_argument("--budget", default="3.25bpw")
    arguments = parser.parse_args()
    folder, (few, more) = resolve(arguments.model), arguments.windows
    plan = load_plan("budget").override(excludes=["embeddings", "head"], samples=arguments.samples, sources=["books"])
    windows = token_windows(load_tokenizer(folder), ["default"], few + more, 512, packaged=EVALUATION_TEXTS)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    study = Study(folder, plan, windows[order[:few]])
    first = study.at(float(arguments.budget.removesuffix("bpw")))
    rows = changes(study, first, arguments.every)
    second = exchanged(study, first, rows, arguments.budget)
    file = Path(study.scratch.name) / "held-out.safetensors"
    study.reference = Reference(study.original, windows[order[few:]], file, "held out")
    results = []
    for assigned in (first, second):
        study.put(assigned)
        results.append(study.reference.compare(study.model).kl)
    difference = results[1] - results[0]
    found = {
        "budget": arguments.budget,
        "rank_correlation": spearman([row["expected"] for row in rows], [row["measured"] for row in rows]),
        "moved": sum(first[name] != second[name] for name in first),
        "kl": float(results[0].mean()),
        "kl_exchanged": float(results[1].mean()),
        "difference": float(difference.mean()),
        "difference_stderr": float(difference.std() / len(difference) ** 0.5),
        "changes": rows,
    }
    write_atomically(arguments.out, json.dumps(found, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key != "changes"}, indent=1))


if __name__ == "__main__":
    main()
