"""What scaling channels or rotating inputs before quantising could buy at best, on top of error feedback.

    python evals/transforms.py MODEL_FOLDER --out results/transforms.json

A weight W is quantised as W T, and T^-1 goes into what computes its input: the norm before it, the rows of v_proj
before o_proj, the rows of up_proj before down_proj. Here every weight has the T that suits it best, even where
neighbours would have to share one or nothing could take T^-1 up; so this bounds what folding can give. Expected KL, in
the metric of the calibration data (T^-1 A T^-T for a changed input), over all Linears of every `--every`th block, each
quantised alone:

- plain: quantised as it is;
- scaled: T = diag(s), s_j = (A_jj)^(a/2), the best of a = 1/8, 1/4 and 1/2 (AWQ, Lin et al., arXiv 2306.00978, section 3.2,
  by the energy of what an error costs instead of the inputs' size), or of equal column norms;
- rotated: T = a Hadamard matrix of the largest power of two that divides the columns, in blocks, with random signs (QuIP#,
  Tseng et al., arXiv 2402.04396, section 3; QuaRot, Ashkboos et al., arXiv 2404.00456).

Once rounded to nearest, and once with error feedback and refinement.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peers import write_atomically
from torch import Tensor

from effllm.allocation.spending import price_folder
from effllm.checkpoint import Checkpoint, resolve
from effllm.methods.quantize import Quantize
from effllm.moments import Metric, Moments
from effllm.plans import load_plan
from effllm.report.progress import track

EXPONENTS = (0.125, 0.25, 0.5)


def cost(weight: Tensor, found: Moments, codec: Quantize, transform: Tensor, with_feedback: bool) -> float:
    """Expected KL of quantising `weight @ transform`, `transform` `[columns, columns]`."""
    changed = weight @ transform
    inverse = torch.linalg.inv(transform)
    seen = Moments(Metric((inverse @ found.solving.dense @ inverse.t())[None], weight.shape[1]), found.rows)
    data = codec.encode(changed, seen if with_feedback else None)
    if with_feedback:
        data = codec.refine(data, changed, seen)
    return float(seen.costs(codec.decode(data, tuple(changed.shape)) - changed).sum())


def scalings(weight: Tensor, found: Moments) -> list[Tensor]:
    """Diagonal transforms to try."""
    energy = found.solving.dense.diagonal().clamp_min(1e-12)
    sizes = [energy.pow(exponent / 2) for exponent in EXPONENTS]
    sizes.append(weight.square().mean(0).clamp_min(1e-12).rsqrt().sqrt())
    return [torch.diag(size / size.log().mean().exp()) for size in sizes]


def hadamard(columns: int) -> Tensor:
    """Orthogonal `[columns, columns]`: Hadamard blocks, rows with random signs."""
    block = torch.ones(1, 1)
    while columns % (2 * len(block)) == 0:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)]) / 2**0.5
    signs = torch.randint(0, 2, (columns, 1), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    whole: Tensor = torch.block_diag(*[block] * (columns // len(block)))  # type: ignore[no-untyped-call]
    return whole * signs


def row(weight: Tensor, found: Moments, codec: Quantize, with_feedback: bool) -> dict[str, float]:
    """Expected KL of one weight: plain, scaled, rotated."""
    identity = torch.eye(weight.shape[1])
    scaled = [cost(weight, found, codec, transform, with_feedback) for transform in scalings(weight, found)]
    plain = cost(weight, found, codec, identity, with_feedback)
    rotated = cost(weight, found, codec, hadamard(weight.shape[1]), with_feedback)
    return {"plain": plain, "scaled": min(plain, *scaled), "rotated": rotated}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| bits | layers | solved | plain, nats | scaled | rotated |", "|---|---|---|---|---|---|"]
    for bits, solved in dict.fromkeys((row["bits"], row["solved"]) for row in rows):
        own = [row for row in rows if (row["bits"], row["solved"]) == (bits, solved)]
        for role in ("all", *dict.fromkeys(row["site"].rpartition(".")[2] for row in own)):
            some = [row for row in own if role in ("all", row["site"].rpartition(".")[2])]
            plain, scaled, rotated = (sum(row[key] for row in some) for key in ("plain", "scaled", "rotated"))
            solving = "error feedback" if solved else "to nearest"
            lines.append(
                f"| {bits} | {role} | {solving} | {plain:.4f} | {scaled / plain:.3f} | {rotated / plain:.3f} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=Path("results/transforms.json"))
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--every", type=int, default=4, help="one of so many blocks is looked at")
    parser.add_argument("--bits", type=int, nargs="*", default=[2, 3, 4])
    parser.add_argument("--group-size", type=int, default=128)
    arguments = parser.parse_args()
    plan = load_plan("budget").override(excludes=["embeddings", "head"], samples=arguments.samples)
    priced = price_folder(plan, Checkpoint.open(resolve(arguments.model)))
    source = priced.source
    chosen = source.blocks[:: arguments.every]
    codecs = {bits: Quantize(bits=bits, group_size=arguments.group_size) for bits in arguments.bits}
    sites = [site for site in source.sites if site.block in chosen]
    rows: list[dict[str, Any]] = []
    for seen in track(priced.again({site.name: next(iter(codecs.values())) for site in sites}, None), "transforms"):
        for site in [site for site in sites if site.name in seen.moments]:
            weight = site.matrix(source.model).float()
            for bits, codec in codecs.items():
                for solved in (False, True):
                    found = row(weight, seen.moments[site.name], codec, solved)
                    rows.append({"site": site.name, "bits": bits, "solved": solved, **found})
    write_atomically(arguments.out, json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
