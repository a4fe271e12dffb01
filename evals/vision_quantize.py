"""What "Quantizing deep convolutional networks" (arXiv 1806.08342) says about weights, measured on one image classifier.

    python evals/vision_quantize.py --out results/vision_quantize.json

By default the model is the small ResNet of the tests, measured on the 10,000 test images of Fashion-MNIST where Debian's
package dataset-fashion-mnist is installed, else on the 1,000 that the tests have; any other model folder and labelled images
can be named. Every row is a folder that `effllm.compress_folder` writes, loaded again; all weights get the row's codec, but
for the presets and the two rows with 2 bits in the blocks. Layer-wise plans learn from images that are not measured, 64 of
them; with 512 they also refit the statistics of batch norms, which otherwise stay those of the original weights.

Accuracy changes are paired with the original by image. Written are OUT (a JSON list of rows, with the keys of effllm's
Result) and OUT with the suffix .md.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import effllm
from effllm.checkpoint import resolve
from effllm.data.images import labelled_batches
from effllm.measure.images import BATCH, compare_images
from effllm.measure.result import Result, describe_run
from effllm.plans import Plan, load_plan

ASSETS = Path(__file__).parent.parent / "tests" / "assets"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
LEARN = 1000  # training images that the layer-wise presets draw theirs from


def plans(calibration: str | None) -> dict[str, Plan]:
    """Every row but the original: its name and plan."""

    def uniform(codec: str) -> Plan:
        return load_plan({"steps": [{"sites": ["*"], "use": f"quantize:{codec}"}]})

    few = ("row", "row,symmetric=true", "row,range=minmax", "tensor", "tensor,symmetric=true", "32", "32,range=minmax")
    rows = {8: ("row", "row,symmetric=true", "tensor", "tensor,symmetric=true"), 6: ("row", "tensor"), 4: few, 3: few}
    words = {"row": "per channel", "tensor": "per tensor", "32": "in groups of 32", "range=minmax": "minmax"}
    found = {}
    for bits, choices in rows.items():
        for choice in choices:
            size, _, setting = choice.partition(",")
            label = f"{bits} bits {words[size]}" + (f", {words.get(setting, 'symmetric')}" if setting else "")
            found[label] = uniform(f"bits={bits},group_size={choice}")
    for name in ("uniform-8bit", "uniform-4bit"):
        found[name] = load_plan(name)
    for name in ("layerwise-4bit", "layerwise-3bit"):
        found[f"{name}, zd"] = load_plan(name).override(score="zd")
        if calibration is not None:
            found[name] = load_plan(name).override(sources=[calibration])
            found[f"{name}, norms refitted"] = load_plan(name).override(sources=[calibration], samples=512)
    if calibration is not None:
        two = {
            "sites": ["blocks"],
            "order": "lim",
            "average_bits": 2.0,
            "high": "quantize:bits=3",
            "low": "quantize:bits=2",
        }
        for samples in (64, 512):
            plan = load_plan({"steps": [two], "calibration": {"sources": [calibration], "samples": samples}})
            found["2 bits in groups of 64" + (", norms refitted" if samples > 64 else "")] = plan
    return found


def debian_images(half: str, count: int | None, scratch: Path) -> Path:
    """A half of Debian's Fashion-MNIST (`train` or `t10k`) as a .npz file."""
    pixels = gzip.decompress((DEBIAN / f"{half}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((DEBIAN / f"{half}-labels-idx1-ubyte.gz").read_bytes())
    images = np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28)[:count]
    file = scratch / f"fashion-mnist-{half}.npz"
    np.savez(file, images=images, labels=np.frombuffer(labels, np.uint8, offset=8)[:count])
    return file


def default_images(scratch: Path) -> tuple[Path, Path | None]:
    """Images to measure on, and images to learn from (None where there are no others)."""
    if DEBIAN.is_dir():
        return debian_images("t10k", None, scratch), debian_images("train", LEARN, scratch)
    return ASSETS / "fashion-mnist-images.npz", None


def run(arguments: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    original = resolve(arguments.model)
    images, calibration = arguments.images, arguments.calibration
    if images is None:
        found, learn = default_images(scratch)
        images, calibration = str(found), calibration or (str(learn) if learn else None)
    batches = list(labelled_batches(original, [images], arguments.samples, BATCH))
    settings = {} if arguments.dtype is None else {"dtype": getattr(torch, arguments.dtype)}
    baseline = effllm.load(original, **settings)
    rows = []
    for name, plan in {"original": None, **plans(calibration)}.items():
        began = time.monotonic()
        folder = original
        if plan is not None:
            folder = scratch / "compressed"
            effllm.compress_folder(original, folder, plan, overwrite=True, check=False)
        figures = compare_images(effllm.load(folder, **settings), batches, baseline).figures()
        facts = describe_run(folder, Path(original).name, Path(original).name, time.monotonic() - began)
        facts |= {"command": "eval", "baseline": Path(original).name, "images": [Path(images).name]}
        rows.append({"row": name, **Result.model_validate(facts | figures).model_dump(mode="json")})
        print(f"{name}: {figures['accuracy']:.2%}", file=sys.stderr, flush=True)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table: differences in points of accuracy, with standard errors."""
    first = rows[0]
    lines = [
        f"{first['model']}, {first['accuracy_images']:,} images of {first['images'][0]}; the original is right on "
        f"{first['accuracy']:.2%} +- {first['accuracy_stderr']:.2%} of them.",
        "",
        "| weights | bytes on disk | bits per weight | accuracy | change, points | KL, nats per image | top-1 agreement |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        change = f"{100 * row['accuracy_change']:+.2f} ± {100 * row['accuracy_change_stderr']:.2f}"
        lines.append(
            f"| {row['row']} | {row['stored_bytes']:,} | {row['bits_per_weight']:.2f} | {row['accuracy']:.2%} | {change} | "
            f"{row['kl']:.5f} | {row['top1_agreement']:.2%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(ASSETS / "fashion-mnist-resnet"), help="a model folder")
    parser.add_argument("--images", help="labelled images, as in effllm eval")
    parser.add_argument("--calibration", help="images that the layer-wise presets learn from, as in effllm compress")
    parser.add_argument("--samples", type=int, help="images to measure on (all)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="arithmetic (the checkpoint's)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=Path("results/vision_quantize.json"))
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    logging.getLogger("effllm").setLevel(logging.ERROR)  # what becomes of batch norms is said above
    with tempfile.TemporaryDirectory() as scratch:
        rows = run(arguments, Path(scratch))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    arguments.out.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
