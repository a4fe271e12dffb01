"""The dry run: what a plan would do to a model, from config and headers alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from effllm.allocation.spending import price_folder
from effllm.checkpoint import Checkpoint, aliases, resolve
from effllm.checkpoint.skeleton import model_class, skeleton
from effllm.data.inputs import refuse_default
from effllm.edits import applied, restructured
from effllm.errors import UsageError
from effllm.measure.memory import Memory, kv_cache, scratch
from effllm.measure.work import working_memory
from effllm.method import Codec
from effllm.moments import Metric, Moments
from effllm.plans import Plan, load_plan
from effllm.report.remarks import remarks
from effllm.site import Site, find_sites, select, unchanged, untied
from effllm.source import StoredModel

HEADER_BYTES = 120  # of one tensor in a safetensors header, about


@dataclass(frozen=True)
class Row:
    """One line of the table: a block, or a weight outside the blocks."""

    name: str
    weights: int
    options: tuple[str, ...]
    """What its sites get; several where an ordering decides at compress time."""
    bits: tuple[float, ...]
    """Stored bits per weight under each option."""
    nbytes: tuple[int, ...]


@dataclass(frozen=True)
class DryRun:
    """What `effllm plan` shows."""

    model: str
    plan: Plan
    rows: list[Row]
    original_bytes: int
    stored_bytes: int
    """Of the weight files; within the headers' size of what `compress` writes."""
    bits_per_weight: float
    memory: Memory
    context: int
    working_memory_bytes: int
    """Peak of the compression itself, beside the interpreter and its libraries."""
    seconds: float
    unchanged: list[tuple[str, float, str]]
    """Weights above 1 % of the model's bytes that no codec touches, with their share and the reason."""
    remarks: list[str]
    """The same in words, with steps that have nothing to act on and batch norms that are not refitted."""
    unloaded: list[str] = field(default_factory=list)
    """Tensors of the checkpoint that the class does not load; kept byte for byte."""
    budget: str | None = None
    """What the plan was chosen within."""
    predicted_kl: float | None = None
    """Expected KL to the original, nats per token (or image); None without data."""
    gap: float | None = None
    """How far the expected loss is above that of the best choice at most, as a share of it."""


def plan(
    model: str | Path | PreTrainedModel,
    plan: str | Path | dict[str, Any] | Plan = "layerwise-4bit",
    context: int | None = None,
    revision: str | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> DryRun:
    """What `plan` would do to `model`; reads no weights, and for an alias no file at all.

    A plan with a budget is the exception: every option is priced, on calibration data unless its effort is `fast`, and
    what comes back is the plan that says for every weight what it gets. Prices are kept for `compress_folder` to use.

    Args:
        model: a live model, a folder, `demo`, an alias or a hub id; with a budget a folder, `demo` or a hub id.
        plan: a preset's name, a YAML file, a dictionary or a `Plan`.
        context: tokens of the KV cache in the memory estimate; what the plan says by default.
        revision: hub revision.
        device: where options are priced.
        seed: of labels drawn from the model.

    Raises:
        UsageError, EffllmError: as `compress_folder` would.
    """
    wanted = load_plan(plan)
    context = context or wanted.context
    if wanted.limited:
        return _within_budget(model, wanted, context, revision, device, seed)
    unloaded: dict[str, int] = {}
    if isinstance(model, PreTrainedModel):
        shape, name = model, type(model).__name__
    elif not Path(model).is_dir() and str(model) in aliases():
        name = str(model)
        config = aliases()[name]["config"]
        model_class(config)
        shape = skeleton(config, getattr(torch, config["dtype"]))
    else:
        name = str(model)
        stored = StoredModel(Checkpoint.open(resolve(model, revision)))
        shape, unloaded = stored.model, stored.unloaded
    with applied(shape, wanted.edits()):
        return _describe(name, shape, wanted, context, unloaded)


def _within_budget(
    model: str | Path | PreTrainedModel, wanted: Plan, context: int, revision: str | None, device: str, seed: int
) -> DryRun:
    """The plan that a budget buys, described, with what it is expected to cost."""
    if isinstance(model, PreTrainedModel):
        raise UsageError("a budget is planned for a model folder; of a live model, effllm.compress spends it at once")
    checkpoint = Checkpoint.open(resolve(model, revision))
    stored = StoredModel(checkpoint)
    refuse_default(wanted, stored.model)
    if wanted.structure():
        where = torch.device(device)
        stored = StoredModel(restructured(checkpoint, wanted.structure(), wanted.calibration, where, seed))
    priced = price_folder(wanted, stored.checkpoint, device, seed)
    solution = priced.solution(stored.model, checkpoint.stored_bytes, stored.unloaded)
    concrete = priced.concrete(solution)
    found = _describe(str(model), stored.model, concrete, context, stored.unloaded)
    loss = priced.predicted(solution.assigned)
    return replace(found, budget=wanted.budget or f"{wanted.ram} to run", predicted_kl=loss, gap=solution.gap)


def _describe(name: str, model: PreTrainedModel, wanted: Plan, context: int, unloaded: dict[str, int]) -> DryRun:
    sites, extra = find_sites(model), sum(unloaded.values())
    options = wanted.options(sites)
    state = untied(model, sites)
    original = sum(tensor.nbytes for tensor in state.values())
    dtype = model.dtype
    plain = {site.name: site.size * dtype.itemsize for site in sites}
    chosen = _expected_bytes(wanted, sites, options, plain)
    outside = original - sum(plain.values())
    stored = {(site.parameter, options.get(site.name), site.shape) for site in sites}
    tensors = sum(len(choice[0].layout(shape)) if choice else 1 for _, choice, shape in stored)
    others = len(state) - len({site.parameter for site in sites})
    excluded = {site.name for site in select(wanted.exclude, sites)}
    counted = [site for site in sites if site.name not in excluded]
    weights_bytes = outside + round(sum(chosen.values())) + extra
    memory = Memory(weights_bytes, kv_cache(model.config, context, dtype), scratch(sites, model.config, context, dtype))
    left = unchanged(model, sites, options)
    return DryRun(
        model=name,
        plan=wanted,
        rows=_rows(sites, options, plain),
        original_bytes=original + extra,
        stored_bytes=weights_bytes + HEADER_BYTES * (tensors + others),
        bits_per_weight=8 * sum(chosen[s.name] for s in counted) / max(1, sum(s.size for s in counted)),
        memory=memory,
        context=context,
        working_memory_bytes=working_memory(model, sites, wanted, dtype),
        seconds=_estimate_seconds(sites, options, wanted, dtype),
        unchanged=left,
        remarks=remarks(model, sites, wanted, left),
        unloaded=list(unloaded),
    )


def _expected_bytes(
    wanted: Plan, sites: list[Site], options: dict[str, tuple[Codec, ...]], plain: dict[str, int]
) -> dict[str, float]:
    """Bytes of each site; where an ordering decides, the mean over the blocks (exact in total where blocks are alike)."""
    shares: dict[tuple[Codec, ...], float] = {}
    for step in wanted.steps:
        if step.use is None and step.high is not None and step.low is not None:
            blocks = {s.block for s in sites if options.get(s.name) == (step.high, step.low)}
            shares[(step.high, step.low)] = step.high_blocks(len(blocks)) / max(1, len(blocks))
    found: dict[str, float] = {}
    for site in sites:
        choice = options.get(site.name)
        if choice is None:
            found[site.name] = plain[site.name]
        elif len(choice) == 1:
            found[site.name] = choice[0].stored_bytes(site.shape)
        else:
            share = shares[choice]
            high, low = (codec.stored_bytes(site.shape) for codec in choice)
            found[site.name] = share * high + (1 - share) * low
    return found


def _rows(sites: list[Site], options: dict[str, tuple[Codec, ...]], plain: dict[str, int]) -> list[Row]:
    rows: dict[str, list[Site]] = {}
    for site in sites:
        rows.setdefault(site.block or site.name, []).append(site)
    table = []
    for name, members in rows.items():
        weights = sum(site.size for site in members)
        count = max(len(options.get(site.name, ())) for site in members)
        sizes, labels = [], []
        for index in range(max(1, count)):
            chosen = {
                s.name: options[s.name][min(index, len(options[s.name]) - 1)] for s in members if s.name in options
            }
            sizes.append(
                sum(chosen[s.name].stored_bytes(s.shape) if s.name in chosen else plain[s.name] for s in members)
            )
            kept = ["unchanged"] if len(chosen) < len(members) else []
            labels.append(" + ".join([*dict.fromkeys(codec.label() for codec in chosen.values()), *kept]))
        table.append(Row(name, weights, tuple(labels), tuple(8 * size / weights for size in sizes), tuple(sizes)))
    return table


def _estimate_seconds(
    sites: list[Site], options: dict[str, tuple[Codec, ...]], wanted: Plan, dtype: torch.dtype
) -> float:
    """Encoding time from timing each codec on a small matrix here, plus the calibration's forward from a small matmul.

    Solving a matrix takes a time in proportion to its columns too.
    """
    sample = torch.randn(512, 1024)
    found = Moments(Metric(torch.eye(1024)[None], 1024), torch.ones(512))

    def work(codec: Codec) -> None:
        data = codec.encode(sample, found if wanted.solves else None)
        if wanted.solves:
            codec.refine(data, sample, found)

    codecs = {codec for choice in options.values() for codec in choice}
    kinds = {codec: type(codec) if wanted.solves else codec for codec in codecs}
    timed = {kind: codec for codec, kind in kinds.items()}
    rates = {kind: _shortest(partial(work, codec)) / sample.numel() for kind, codec in timed.items()}
    seconds = 0.0
    for site in (site for site in sites if site.name in options):
        columns = site.shape[1] / sample.shape[1] if wanted.solves else 1
        seconds += site.size * columns * max(rates[kinds[codec]] for codec in options[site.name])
    if wanted.needs_data:
        one = torch.randn(512, 512, dtype=dtype)
        rate = _shortest(partial(torch.matmul, one, one)) / one.shape[0] ** 3
        weights = sum(site.size for site in sites if site.block)
        seconds += rate * weights * wanted.calibration.samples * wanted.calibration.sequence_length
    return seconds


def _shortest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of three runs."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)
