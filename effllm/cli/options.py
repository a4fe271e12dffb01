"""The options that several commands share, and what their texts stand for."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from effllm.errors import UsageError

ModelArgument = Annotated[str, typer.Argument(help="A model folder, 'demo', an alias such as llama-7b, or a hub id.")]
PlanOption = Annotated[
    str | None,
    typer.Option(
        "--plan", help="A preset (see 'effllm methods') or a plan file (.yaml); layerwise-4bit without a budget."
    ),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(
        "--budget",
        help="What the weights may take: 2GB (of weight files), 4.25bpw (bits per weight) or 0.25x (of the original). Each "
        "matrix gets the option that makes the expected loss least; with --plan, among what the plan offers.",
    ),
]
RamOption = Annotated[
    str | None, typer.Option("--ram", help="The same for weights, KV cache and scratch together, such as 3GB.")
]
ContextOption = Annotated[
    int | None, typer.Option("--context", min=1, help="Tokens of context in memory figures (4096).")
]
EffortOption = Annotated[
    str | None,
    typer.Option(
        "--effort",
        help="fast: no data, round to nearest; normal: priced and solved on calibration data; best: then learnt block by "
        "block.",
    ),
]
FastOption = Annotated[bool, typer.Option("--fast", help="Price without data, in seconds: the same as --effort fast.")]
InputsOption = Annotated[
    str | None,
    typer.Option(
        "--inputs", help="original or compressed: what a matrix is solved for: the inputs it saw, or will see."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="GLOB=METHOD:key=value,... What these sites get, whatever the plan says. Repeatable."),
]
ExcludeOption = Annotated[
    list[str] | None, typer.Option("--exclude", help="GLOB of sites left as they are. Repeatable.")
]
CalibrationOption = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        help="Data to learn from. Text: a file, a folder, or a datasets id as id:config:split:column; @weight sets its "
        "share (default: books and code in the package, half and half; self: what the model itself writes). Vision "
        "models: a folder of images, or .npz. Speech models: a folder of .wav files. Repeatable.",
    ),
]
SamplesOption = Annotated[int | None, typer.Option("--samples", min=1, help="Calibration windows (64).")]
LengthOption = Annotated[int | None, typer.Option("--sequence-length", min=8, help="Tokens a window (512).")]
ScoreOption = Annotated[
    str | None,
    typer.Option(
        "--score",
        help="A score of 'effllm methods' to order the blocks by, such as lim (default: what the plan says).",
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda, mps.")]
DtypeOption = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16 for the arithmetic and what stays dense.")
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads (all cores).")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub id.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")]


def spending_of(
    budget: str | None, ram: str | None, context: int | None, effort: str | None, fast: bool, inputs: str | None
) -> dict[str, Any]:
    if fast and effort not in (None, "fast"):
        raise UsageError(f"--fast and --effort {effort} contradict each other; give one")
    effort = "fast" if fast else effort
    return {"budget": budget, "ram": ram, "context": context, "effort": effort, "inputs": inputs}


def plan_of(
    plan: str | None, sets: list[str] | None, excludes: list[str] | None, score: str | None,
    calibration: list[str] | None, samples: int | None, sequence_length: int | None, spending: dict[str, Any],
) -> Any:  # fmt: skip
    from effllm.plans import BUDGET, load_plan

    limited = spending["budget"] or spending["ram"]
    return load_plan(plan or (BUDGET if limited else "layerwise-4bit")).override(
        sets or (), excludes or (), score, spending, sources=calibration, samples=samples,
        sequence_length=sequence_length,
    )  # fmt: skip


def device_of(device: str, threads: int | None) -> str:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device}: {str(error).splitlines()[0]}") from None
    return device


def dtype_of(name: str | None) -> Any:
    import torch

    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name is not None and name not in known:
        raise UsageError(f"--dtype {name}: known: {', '.join(known)}")
    return known[name] if name else None


def bytes_of(size: str | None) -> int | None:
    from effllm.budget import in_bytes

    if size is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([kMGT]?)B?", size.strip(), re.IGNORECASE)
    if found is None:
        raise UsageError(f"a size is written as 3GB or 500MB (GB is 10**9 bytes), not {size!r}")
    return int(in_bytes(found[1], found[2]))
