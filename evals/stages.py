"""What each stage of the encoding buys, and what it takes, at the bits that a budget gives each matrix.

    python evals/stages.py MODEL_FOLDER --out results/stages.json

Only the Linear weights of the blocks are quantised. What may be chosen is `quantize`, at each budget the same allocation for
all of these rows:

- nearest: codes rounded to nearest, ranges searched;
- feedback: what rounding a column loses is made up for by later ones, in the metric of the expected KL;
- refined: then scales and codes are fitted to each other in turns (`--effort normal`);
- learnt: then the scales of each block are learnt on its output (`--effort best`);
- ..., compressed: refined for the inputs that compressed blocks give.

Then scaled inputs (`awq`) or rotated ones (`hadamard`) are offered too, each matrix getting what its prices favour, or
all have to be rotated.

KL, perplexity and agreement with the original are measured on held-out text, errors over windows; seconds are those of the
rewrite, after prices are known. Rows that stand in OUT are skipped.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peer_quantizers.reference import Reference
from peers import write_atomically
from torch import Tensor

from effllm.allocation.spending import Priced, price_folder
from effllm.checkpoint import Checkpoint, resolve
from effllm.data.text import EVALUATION_TEXTS, load_tokenizer, token_windows
from effllm.layers.placing import Members, Stored, by_parameter, decode_stored
from effllm.loading import load
from effllm.method import Codec
from effllm.plans import Plan, load_plan
from effllm.progress import track
from effllm.statistics.again import Seen
from effllm.train import encode_unit

Stage = Literal["nearest", "feedback", "refined", "learnt"]
PLAIN, SCALED, BOTH, ROTATED = ("quantize",), ("quantize", "awq"), ("quantize", "hadamard"), ("hadamard",)
ROWS: list[tuple[tuple[str, ...], Stage, str]] = [
    (PLAIN, "nearest", "original"), (PLAIN, "feedback", "original"), (PLAIN, "refined", "original"),
    (SCALED, "refined", "original"), (ROTATED, "refined", "original"), (BOTH, "refined", "original"),
    (BOTH, "learnt", "original"), (BOTH, "refined", "compressed"),
]  # fmt: skip


def planned(choose: Sequence[str], samples: int, **spending: str) -> Plan:
    """A budget spent on the blocks among the options of some codecs."""
    values = {"budget": "4.25bpw", "steps": [{"sites": ["blocks"], "choose": list(choose)}]}
    return load_plan(values).override(
        excludes=["embeddings", "head"], spending=spending, samples=samples, sources=["books"]
    )


def rewrite(priced: Priced, assigned: dict[str, Codec], stage: Stage) -> dict[str, Tensor]:
    """Parameter -> what is decoded for it."""
    source, members, decoded = priced.source, by_parameter(priced.source.sites, assigned), {}

    def compressed(unit: str) -> dict[str, Tensor]:
        return {name: decoded[name] for name in source.units[unit] if name in decoded}

    walk = priced.again(assigned, compressed if priced.plan.inputs == "compressed" else None)
    for seen in track(walk, stage):
        own = {name: members[name] for name in source.units[seen.unit] if name in members}
        with source.resident(seen.unit), torch.no_grad():
            stored = encoded(own, seen, stage)
            decoded |= {name: decode_stored(source.model, own[name], stored[name]) for name in own}
    return decoded


def encoded(members: dict[str, Members], seen: Seen, stage: Stage) -> dict[str, Stored]:
    """What a stage stores for the parameters of a unit; dense models have one site a parameter."""
    if stage in ("refined", "learnt"):
        return encode_unit(seen.source.model, members, seen)
    stored = {}
    for name, codecs in members.items():
        ((codec, (site,)),) = codecs.items()
        found = seen.moments[site.name] if stage == "feedback" else None
        stored[name] = {codec: codec.encode(site.matrix(seen.source.model), found)}
    return stored


def run(
    folder: Path, budget: float, choose: Sequence[str], stage: Stage, inputs: str, samples: int, reference: Reference
) -> dict[str, Any]:
    """One row."""
    effort = "best" if stage == "learnt" else "normal"
    plan = planned(choose, samples, budget=f"{budget}bpw", effort=effort, inputs=inputs)
    checkpoint = Checkpoint.open(folder)
    priced = price_folder(plan, checkpoint)
    solution = priced.solution(priced.source.model, checkpoint.stored_bytes, {})
    began = time.perf_counter()
    decoded = rewrite(priced, solution.assigned, stage)
    seconds = time.perf_counter() - began
    model = load(folder, dtype=torch.float32)
    for name, tensor in decoded.items():
        model.get_parameter(name).data.copy_(tensor)
    bits = 8 * solution.nbytes / sum(site.size for site in priced.source.sites if site.name in priced.options)
    figures = reference.compare(model).figures()
    return {"budget": budget, "bits_per_weight": bits, "choose": list(choose), "stage": stage, "inputs": inputs,
            "seconds": seconds, "predicted_kl": priced.predicted(solution.assigned), **figures}  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| bits | offered | stage | inputs | rewrite s | expected KL | KL ± se | perplexity | top-1 |"]
    lines.append("|" + 9 * "---|")
    for row in sorted(rows, key=lambda row: row["budget"]):
        lines.append(
            f"| {row['bits_per_weight']:.3f} | {', '.join(row['choose'])} | {row['stage']} | {row['inputs']} "
            f"| {row['seconds']:.0f} | {row['predicted_kl']:.4f} | {row['kl']:.4f} ± {row['kl_stderr']:.4f} "
            f"| {row['perplexity']:.2f} | {100 * row['top1_agreement']:.1f} % |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=Path("results/stages.json"))
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--windows", type=int, default=16, help="held-out windows of 512 tokens")
    parser.add_argument("--budgets", type=float, nargs="*", default=[2.25, 3.25, 4.25], help="bits per weight")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = resolve(arguments.model)
    windows = token_windows(load_tokenizer(folder), ["default"], arguments.windows, 512, packaged=EVALUATION_TEXTS)
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    with tempfile.TemporaryDirectory(prefix="effllm-stages-") as scratch:
        reference = Reference(
            load(folder, dtype=torch.float32), windows, Path(scratch) / "reference.safetensors", "own"
        )
        price_folder(planned([*SCALED, *ROTATED], arguments.samples), Checkpoint.open(folder))
        for budget in arguments.budgets:
            for choose, stage, inputs in ROWS:
                wanted = {"budget": budget, "choose": list(choose), "stage": stage, "inputs": inputs}
                if not any(all(row[key] == value for key, value in wanted.items()) for row in rows):
                    rows.append(run(folder, budget, choose, stage, inputs, arguments.samples, reference))
                    write_atomically(arguments.out, json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
