"""The command line. Results go to stdout, progress and messages to stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from effllm.cli.options import (
    BudgetOption,
    CalibrationOption,
    ContextOption,
    DeviceOption,
    DtypeOption,
    EffortOption,
    ExcludeOption,
    FastOption,
    InputsOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    PlanOption,
    RamOption,
    RevisionOption,
    SamplesOption,
    ScoreOption,
    SeedOption,
    SetOption,
    ThreadsOption,
    bytes_of,
    device_of,
    dtype_of,
    plan_of,
    spending_of,
)
from effllm.errors import EffllmError, UsageError

WRONG_USAGE: Any = typer.BadParameter.__base__  # click's UsageError, or the one in typer's own copy of click
INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Makes Hugging Face models small and fast.\n\n"
    "First steps: [bold]effllm plan demo[/], [bold]effllm compress demo[/], [bold]effllm eval demo-layerwise-4bit[/].",
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Say on stderr what is being done.")] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, stream=sys.stderr, format="%(message)s")
    logging.getLogger("effllm").setLevel(logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)


@app.command(epilog="Example: effllm compress llama-7b --plan layerwise-4bit --out llama-4bit")
def compress(
    model: ModelArgument,
    plan: PlanOption = None,
    budget: BudgetOption = None,
    ram: RamOption = None,
    context: ContextOption = None,
    effort: EffortOption = None,
    fast: FastOption = False,
    inputs: InputsOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Output folder (./NAME-PLAN).")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier effllm output.")] = False,
    check: Annotated[
        bool | None,
        typer.Option("--check/--no-check", help="Measure KL and perplexity of the result (where the plan used data)."),
    ] = None,
    set_: SetOption = None,
    exclude: ExcludeOption = None,
    calibration: CalibrationOption = None,
    samples: SamplesOption = None,
    sequence_length: LengthOption = None,
    score: ScoreOption = None,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            "--max-memory", help="Most memory for the work beside the libraries, such as 3GB (half of what is free)."
        ),
    ] = None,
    seed: SeedOption = 0,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compress a model folder into a packed one that from_pretrained loads. Killed? The same command resumes."""
    import effllm

    spending = spending_of(budget, ram, context, effort, fast, inputs)
    wanted = plan_of(plan, set_, exclude, score, calibration, samples, sequence_length, spending)
    result = effllm.compress_folder(
        model, out, wanted, overwrite=overwrite, check=check, device=device_of(device, threads), dtype=dtype_of(dtype),
        max_memory=bytes_of(max_memory), seed=seed, revision=revision,
    )  # fmt: skip
    if as_json:
        _print(result.model_dump_json(indent=2))
    else:
        from effllm.report.tables import show_result

        show_result(result)


@app.command(epilog="Example: effllm plan llama-7b --plan layerwise-4bit --context 8192 -o plan.yaml")
def plan(
    model: ModelArgument,
    plan: PlanOption = None,
    budget: BudgetOption = None,
    ram: RamOption = None,
    context: ContextOption = None,
    effort: EffortOption = None,
    fast: FastOption = False,
    inputs: InputsOption = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the plan to a file that replays exactly.")
    ] = None,
    set_: SetOption = None,
    exclude: ExcludeOption = None,
    calibration: CalibrationOption = None,
    samples: SamplesOption = None,
    sequence_length: LengthOption = None,
    score: ScoreOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a plan would do: every layer, its bits and bytes, the memory to run. Reads config and headers alone; with
    a budget it also prices every option, and compress uses the prices again."""
    import effllm
    from effllm.report.tables import dry_run_json, show_dry_run

    spending = spending_of(budget, ram, context, effort, fast, inputs)
    wanted = plan_of(plan, set_, exclude, score, calibration, samples, sequence_length, spending)
    found = effllm.plan(model, wanted, revision=revision, device=device_of(device, threads), seed=seed)
    if output is not None:
        output.write_text(found.plan.to_yaml(), encoding="utf-8")
    if as_json:
        _print(json.dumps(dry_run_json(found), indent=2))
    else:
        show_dry_run(found)


@app.command(epilog="Example: effllm diff mine.yaml yours.yaml --model demo")
def diff(
    one: Annotated[str, typer.Argument(help="A preset or a plan file.", metavar="PLAN")],
    other: Annotated[str, typer.Argument(help="Another.", metavar="PLAN")],
    model: Annotated[str, typer.Option("--model", help="The model that the plans are for.")],
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Where two plans differ: bits, bytes and expected loss, layer by layer."""
    from effllm.report.diff import diff as compare
    from effllm.report.diff import settings_that_differ, show

    found = compare(one, other, model, revision, device_of(device, None), seed)
    if as_json:
        _print(json.dumps([asdict(row) for row in found], indent=2))
    else:
        show(found, (one, other), settings_that_differ(one, other))


@app.command("eval", epilog="Example: effllm eval ./out --baseline ./my-model --text my-texts.txt")
def evaluate(
    model: ModelArgument,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help="The original, for KL and top-1 agreement (what OUT names, if demo)."),
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text", help="Text to measure on, one row each. Repeatable. Default: a held-out book's beginning."
        ),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            "--images",
            help="Labelled images, for an image classifier: a folder of one subfolder a class, a .npz file, or a datasets "
            "id as id:config:split:column. Repeatable.",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=1, help="Windows of text (32), or images (all).")
    ] = None,
    sequence_length: Annotated[int, typer.Option("--sequence-length", min=8, help="Tokens a window.")] = 512,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a model: perplexity or accuracy, KL to the original, bytes, peak memory, speed."""
    import effllm

    where, arithmetic = device_of(device, threads), dtype_of(dtype)
    results = [
        effllm.evaluate(model, baseline, source, samples, sequence_length, where, arithmetic, revision, images)
        for source in ([[one] for one in text] if text else [None])
    ]
    if as_json:
        dumped = [result.model_dump(mode="json") for result in results]
        _print(json.dumps(dumped[0] if len(dumped) == 1 else dumped, indent=2))
    else:
        from effllm.report.tables import show_result

        for result in results:
            show_result(result)


@app.command("methods")
def list_methods(
    name: Annotated[str | None, typer.Argument(help="A method or preset to explain.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List every method and preset with its paper; with a NAME, explain it."""
    from effllm.report.tables import methods_json, show_methods

    if as_json:
        _print(json.dumps(methods_json(), indent=2))
    else:
        show_methods(name)


@app.command(epilog="Example: effllm chat ./out --prompt 'It was a dark night'")
def chat(
    model: ModelArgument,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Answer this and stop; without it, talk.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Most new tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="0 takes the likeliest token.")] = 0.7,
    device: DeviceOption = "cpu",
    dtype: DtypeOption = None,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    revision: RevisionOption = None,
) -> None:
    """Talk to a model: streams its answer, then tokens per second and memory."""
    from effllm.report.chat import talk

    talk(model, prompt, tokens, temperature, device_of(device, threads), dtype_of(dtype), seed, revision)


@app.command(
    epilog="Example: effllm run -- lm_eval --model hf --model_args pretrained=./out --tasks hellaswag",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def run(
    command: Annotated[list[str], typer.Argument(help="The command and its arguments.")],
) -> None:
    """Run any program with packed models: every Python process that it starts can load them."""
    from effllm.integrations import run as runner

    runner.run(command)


@app.command(epilog="Example: effllm autoload on")
def autoload(
    action: Annotated[str, typer.Argument(help="on, off or status.", metavar="ACTION")] = "status",
) -> None:
    """Let every Python process of this environment load packed models, without an import in the program."""
    from effllm.integrations import autoload as switch

    actions = {"on": switch.turn_on, "off": switch.turn_off, "status": switch.status}
    if action not in actions:
        raise UsageError(f"autoload {action}: known: {', '.join(actions)}")
    _print(actions[action]())


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def main() -> None:
    """Runs the command line; exit status 0 done, 1 a failure that one line explains, 2 wrong usage."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin starve each other on a busy machine
    try:
        status = app(prog_name="effllm", standalone_mode=False) or 0
    except WRONG_USAGE as error:
        status, message = 2, error.format_message().rstrip(".")
        if message:  # none where no command is given: that has printed the help
            _complain(f"{message}; see {error.ctx.command_path if error.ctx else 'effllm'} --help")
    except (EffllmError, OSError) as error:
        if "--debug" in sys.argv:
            raise
        status = 2 if isinstance(error, UsageError) else 1
        _complain(str(error))
    except typer.Abort:
        status = INTERRUPTED
    if status == INTERRUPTED:
        _complain("interrupted; the same command resumes")
    sys.exit(status)


def _complain(message: str) -> None:
    sys.stderr.write(f"effllm: {' '.join(message.split())}\n")
