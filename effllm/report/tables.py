"""How results look on a terminal."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from effllm.errors import UsageError, nearest
from effllm.measure.result import Result
from effllm.method import Method
from effllm.plans import load_plan, presets
from effllm.registry import USES, kind_of, methods
from effllm.report.dry_run import DryRun

SHOWN = 2  # options of a block that the table of a plan spells out


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{max(1, seconds):.0f} s"


def show_result(result: Result) -> None:
    """One Result as a table."""
    table = Table(show_header=False, title=result.model, title_justify="left")
    table.add_row("weight files", f"{result.stored_bytes:,} bytes ({_size(result.stored_bytes)})")
    table.add_row("bits per weight", f"{result.bits_per_weight:.3f}")
    for label, value, error, count in result.figures():
        table.add_row(label, f"{value:.4f}" + (f" +- {error:.4f}" if error else "") + f"   ({count})")
    if result.tokens_per_second is not None:
        table.add_row("decode", f"{result.tokens_per_second:.1f} tokens/s")
    if result.images_per_second is not None:
        table.add_row("one image at a time", f"{result.images_per_second:.1f} images/s")
    if result.peak_memory_bytes is not None:
        table.add_row("peak memory of a run", _size(result.peak_memory_bytes))
    if result.text:
        table.add_row("text", ", ".join("held-out book in the package" if t == "default" else t for t in result.text))
    if result.images:
        table.add_row("images", ", ".join(result.images))
    if result.seconds is not None:
        table.add_row("took", _time(result.seconds))
    console = Console()
    if result.message:
        console.print(result.message)
    console.print(table)


def _in_short(method: str) -> str:
    """What a block gets, by kind where its matrices get many different options; a plan file (-o) has them all."""
    options = method.split(" + ")
    if len(options) <= SHOWN:
        return method
    kinds = dict.fromkeys(option.partition(":")[0] for option in options)
    return f"{len(options)} options of {', '.join(kinds)}"


def show_dry_run(found: DryRun) -> None:
    """The plan's table: what every layer gets, then totals."""
    table = Table(title=f"{found.model}, plan {found.plan.name}", title_justify="left")
    for column in ("layer", "method", "bits", "MB"):
        table.add_column(
            column, justify="left" if column in ("layer", "method") else "right", no_wrap=column != "method"
        )
    for row in found.rows:
        bits = " or ".join(f"{value:.2f}" for value in row.bits)
        method = _in_short(row.options[0]) if len(row.options) == 1 else "the ordering decides"
        table.add_row(row.name, method, bits, " or ".join(f"{size / 1e6:.3f}" for size in row.nbytes))
    console = Console()
    console.print(table)
    for step in found.plan.steps:
        if step.order is not None and step.high is not None and step.low is not None:
            blocks = sum(1 for row in found.rows if len(row.options) > 1)
            high = step.high_blocks(blocks)
            console.print(
                f"{high} of {blocks} blocks get {step.high.label()}, the others {step.low.label()}: "
                f"{step.order.label()} decides at compress time"
            )
    if found.budget is not None:
        exact = "the best choice" if not found.gap else f"within {found.gap:.2%} of the best choice"
        loss = "no KL is predicted without data" if found.predicted_kl is None else (
            f"expected KL to the original {found.predicted_kl:.4f} nats a token"
        )  # fmt: skip
        console.print(f"budget        {found.budget}: {loss}; {exact} by these prices")
    for line in found.remarks:
        console.print(line)
    for name in found.unloaded:
        console.print(f"not loaded by the class, kept byte for byte: {name}")
    memory = found.memory
    console.print(
        f"weight files  {_size(found.original_bytes)} -> {_size(found.stored_bytes)}, "
        f"{found.bits_per_weight:.3f} bits per weight"
    )
    cached = bool(memory.kv_by_layer)
    console.print(
        f"to run        {_size(memory.total)} {f'at {found.context} tokens' if cached else 'for one input'}: weights "
        f"{_size(memory.weights)}, {f'KV cache {_size(memory.kv)}, ' if cached else ''}scratch {_size(memory.scratch)} "
        "(estimate; the runtime itself apart)"
    )
    console.print(
        f"to compress   about {_time(found.seconds)} here, {_size(found.working_memory_bytes)} beside the libraries"
    )


def dry_run_json(found: DryRun) -> dict[str, Any]:
    """The dry run as plain JSON values."""
    values = asdict(found) | {"plan": found.plan.model_dump(mode="json", exclude_defaults=True)}
    values["memory"] |= {"kv": found.memory.kv, "total": found.memory.total}
    return values


def methods_json() -> dict[str, Any]:
    """Methods and presets as plain JSON values."""
    return {
        "methods": {
            name: {"kind": kind_of(cls), "paper": cls.paper, "doc": inspect.getdoc(cls)}
            for name, cls in methods().items()
        },
        "presets": {name: load_plan(name).description for name in presets()},
    }


def _show_method(name: str, cls: type[Method], console: Console) -> None:
    """The docstring, its paragraphs as wide as the terminal, and the settings."""
    for number, text in enumerate((inspect.getdoc(cls) or "").split("\n\n")):
        console.print(("" if number else f"{name}: ") + " ".join(text.split()) + "\n", markup=False, highlight=False)
    schema: dict[str, Any] = cls.model_json_schema().get("properties", {})
    if schema:
        table = Table("setting", "default", "values", "")
        for key, field in schema.items():
            default = getattr(cls(), key)
            shown = default.label() if isinstance(default, Method) else json.dumps(default).strip('"')
            table.add_row(key, shown, _values(field), field.get("description", ""))
        console.print(table)
    spec = f"{name}:SETTING=VALUE,..." if schema else name
    console.print(f"{spec}: {USES[kind_of(cls)]}", markup=False, highlight=False)


def _values(schema: dict[str, Any]) -> str:
    """What a field takes, from its JSON schema."""
    if "anyOf" in schema:
        return ", or ".join(_values(one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(map(str, schema.get("enum", [schema.get("const")])))
    kind = {"integer": "whole number", "boolean": "true, false"}.get(
        schema.get("type", ""), schema.get("type", "a codec")
    )
    words = {"minimum": "{} or more", "exclusiveMinimum": "above {}", "maximum": "at most {}"}
    return ", ".join([kind, *(text.format(schema[key]) for key, text in words.items() if key in schema)])


def show_methods(name: str | None) -> None:
    """All methods and presets, or the documentation of one."""
    console = Console()
    known = methods()
    if name is not None:
        if name in known:
            _show_method(name, known[name], console)
        elif name in presets():
            console.print(presets()[name].read_text(), markup=False)
        else:
            raise UsageError(f"no method or preset {name!r}: {nearest(name, [*known, *presets()])}")
        return
    table = Table("method", "kind", "what it is", "paper", "data", title="methods", title_justify="left")
    for key, cls in known.items():
        doc = (inspect.getdoc(cls) or "").split("\n", 1)[0]
        table.add_row(key, kind_of(cls), doc, cls.paper, "needs data" if cls.needs_data else "none")
    console.print(table)
    plans = Table("preset", "what it does", title="presets (--plan NAME)", title_justify="left")
    for key in presets():
        plans.add_row(key, load_plan(key).description)
    console.print(plans)
