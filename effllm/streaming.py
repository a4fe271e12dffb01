"""`compress_folder`: inspect, collect, choose, rewrite, check, with one unit of the model in memory at a time."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

from effllm.allocation.spending import Priced, price_folder
from effllm.checkpoint import Checkpoint, resolve
from effllm.checkpoint.checksum import checksum, to_text
from effllm.data.inputs import folder_batches, refuse_default
from effllm.edits import restructured
from effllm.errors import EffllmError
from effllm.layers.placing import by_parameter, decode_stored, read_stored, return_freed_memory
from effllm.measure.evaluate import evaluate, has_held_out
from effllm.measure.result import Result, describe_run
from effllm.measure.work import refuse_too_large, working_memory
from effllm.method import Codec, Score
from effllm.output import Output, largest_bytes
from effllm.pipeline import refuse_misfit
from effllm.plans import Plan, load_plan
from effllm.progress import track
from effllm.report.model_folder import model_card, other_files
from effllm.report.remarks import remarks
from effllm.resume import RunJournal
from effllm.shards import shard_units, unit_tensors, write_shard
from effllm.site import unchanged
from effllm.source import StoredModel, arithmetic
from effllm.statistics.again import Seen

logger = logging.getLogger(__name__)


def compress_folder(
    source: str | Path,
    out: str | Path | None = None,
    plan: str | Path | dict[str, Any] | Plan = "layerwise-4bit",
    *,
    overwrite: bool = False,
    check: bool | None = None,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    max_memory: int | None = None,
    revision: str | None = None,
    seed: int = 0,
) -> Result:
    """Compresses a model folder into another, streamed; a killed run resumes with the same call.

    Args:
        source: a folder, `demo`, an alias or a hub id.
        out: the output folder; `./NAME-PLAN` by default. It is complete or does not exist.
        plan: a preset's name, a YAML file, a dictionary or a `Plan`.
        overwrite: replace an earlier effllm output at `out`, and forget an unfinished one.
        check: measure KL and perplexity of the result; by default where the plan used data.
        device: where blocks are run and weights encoded.
        dtype: dtype of the arithmetic and of the tensors left as they are; the checkpoint's by default.
        max_memory: refuse, before any work, a run that would need more bytes than this beside the libraries; by default half
            of what is free, where the plan prices or solves.
        revision: hub revision.
        seed: seed of everything random.

    Raises:
        UsageError, EffllmError: see `Checkpoint.open`, `load_plan`, `StoredModel`; a full disk, an `out` that holds
            something else, a weight with NaN or inf.
    """
    torch.manual_seed(seed)
    return_freed_memory()
    began = time.monotonic()
    checkpoint = Checkpoint.open(resolve(source, revision))
    wanted = load_plan(plan)
    name = Path(source).name if Path(source).is_dir() else str(source)
    target = Path(out or f"{name.replace('/', '-')}-{wanted.name}")
    stored = StoredModel(checkpoint, dtype, device)
    refuse_misfit(stored.model, wanted)
    refuse_default(wanted, stored.model)
    refuse_too_large(working_memory(stored.model, stored.sites, wanted, stored.dtype), max_memory, wanted)
    output = Output(target.resolve(), name, checkpoint, wanted, stored.dtype, torch.get_num_threads(), overwrite)
    if output.exists():
        RunJournal.remove(output.path)
        return _result(output, began, message="already done: nothing was changed")
    if overwrite:
        RunJournal.forget(output.partial)
    other_files(checkpoint.folder)
    if wanted.structure():
        edited = restructured(checkpoint, wanted.structure(), wanted.calibration, stored.device, seed)
        stored = StoredModel(edited, dtype, device)
    output.check_disk(largest_bytes(stored, wanted.options(stored.sites)) + sum(stored.unloaded.values()))
    measure = wanted.needs_data if check is None else check
    measure = measure and has_held_out(stored.model, target) and (bool(check) or _fits(checkpoint))
    try:
        with output.explain_full_disk():
            return _carry_out(output, stored, measure, seed, began)
    except FileNotFoundError:
        if not replace(output, overwrite=False).exists():
            raise
        return _result(output, began, message="finished by another process")


def _carry_out(output: Output, source: StoredModel, measure: bool, seed: int, began: float) -> Result:
    journal = RunJournal(output.partial, output.key)
    if output.exists():
        journal.discard()
        return _result(output, began, message="finished by another process")
    try:
        assigned, priced = _choose(output, source, journal, seed)
        left = unchanged(source.model, source.sites, assigned)
        for line in remarks(source.model, source.sites, output.plan, left):
            logger.warning(line)
        for name in source.unloaded:
            logger.warning("not loaded by the class, kept byte for byte: %s", name)
        shards = _rewrite(output, source, assigned, priced, journal)
    except EffllmError:
        journal.discard()
        raise
    folder, original = output.partial, output.checkpoint.folder
    with journal.claim("finish"):
        output.write_index([folder / shard["file"] for shard in shards])
        checksums = to_text(number for shard in shards for number in shard["checksums"])
        output.write_config(source.sites, assigned, checksums)
        for name, file in other_files(original).items():
            shutil.copyfile(file, folder / name)
        measured = evaluate(folder, baseline=original) if measure else None
        predicted = priced.predicted(assigned) if priced else None
        result = _result(output, began, folder, measured, predicted)
        (folder / "README.md").write_text(model_card(output.name, original, result), encoding="utf-8")
        output.publish()
    RunJournal.remove(output.path)
    return result


def _fits(checkpoint: Checkpoint) -> bool:
    """Whether original and result can be in memory together, to be measured."""
    needed, free = 2.5 * checkpoint.stored_bytes, psutil.virtual_memory().available
    if needed > free:
        logger.warning("the result is not measured: that takes %.1f GB, and %.1f GB are free", needed / 1e9, free / 1e9)
    return bool(needed <= free)


def _choose(
    output: Output, source: StoredModel, journal: RunJournal, seed: int
) -> tuple[dict[str, Codec], Priced | None]:
    """The codec of every site, and the prices, where the plan has some; what an earlier run recorded is not done again."""
    plan = output.plan
    priced = price_folder(plan, source.checkpoint, source.device, seed) if plan.priced else None
    if priced is not None and plan.limited:
        return priced.solution(source.model, output.checkpoint.stored_bytes, source.unloaded).assigned, priced
    ranks: dict[Score, dict[str, float]] = {}
    for score in plan.scores():
        with journal.claim(f"score-{score.name()}"):
            line = journal.find("score", score.label())
            if line is None:
                settings, folder = plan.calibration, output.checkpoint.folder
                if score.needs_data:
                    walked = StoredModel(source.checkpoint, arithmetic(source.dtype, source.device), source.device)
                    values = score.score(walked, folder_batches(settings, walked.model, folder))
                else:
                    values = score.score(source, [])
                journal.add("score", score.label(), values=values)
            else:
                values = line["values"]
        ranks[score] = values
    return plan.assign(source.sites, ranks), priced


def _rewrite(
    output: Output, source: StoredModel, assigned: dict[str, Codec], priced: Priced | None, journal: RunJournal
) -> list[dict[str, Any]]:
    """Writes one shard a unit, skipping those that are done; returns the journal's lines once every one stands."""
    units, members = shard_units(source, output.plan), by_parameter(source.sites, assigned)
    files = {unit: f"model-{i:05d}-of-{len(units):05d}.safetensors" for i, unit in enumerate(units, start=1)}

    def written(unit: str) -> dict[str, Tensor]:
        with journal.claim(f"unit-{units.index(unit)}"):
            return load_file(output.partial / journal.find("unit", unit)["file"])  # type: ignore[index]

    def decoded(unit: str) -> dict[str, Tensor]:
        tensors = written(unit)
        names = members.keys() & set(source.units[unit])
        model = priced.source.model if priced else source.model  # whose block is resident
        return {n: decode_stored(model, members[n], read_stored(members[n], tensors)) for n in names}

    def visits(pending: list[str]) -> Iterator[tuple[str, Seen | None]]:
        """Units with what came by at them, in the order in which they come by."""
        visited = set()
        if priced is not None and priced.prices is not None:
            if output.plan.inputs == "compressed":
                again = priced.again(assigned, decoded)
            else:
                left = {site.name for site in source.sites if {*pending} & {*source.units_of([site])}}
                again = priced.again({name: codec for name, codec in assigned.items() if name in left}, None)
            for one in again:
                if one.unit in pending:
                    yield one.unit, one
                    visited.add(one.unit)
        yield from ((unit, None) for unit in pending if unit not in visited)

    waiting = False
    while True:
        done = {unit: line for unit in units if (line := journal.find("unit", unit)) is not None}
        pending = [unit for unit in units if unit not in done]
        if not pending:
            return [done[unit] for unit in units]
        for unit, seen in track(visits(pending), "rewrite", total=len(pending)):
            with journal.claim(f"unit-{units.index(unit)}", wait=waiting) as mine:
                if mine and journal.find("unit", unit) is None:
                    tensors = unit_tensors(source, output.plan, unit, members, seen, written)
                    digest = write_shard(output.partial / files[unit], tensors)
                    checksums = [checksum(name, tensor) for name, tensor in tensors.items()]
                    journal.add("unit", unit, file=files[unit], sha256=digest, checksums=checksums)
        waiting = True


def _result(
    output: Output,
    began: float,
    folder: Path | None = None,
    measured: Result | None = None,
    predicted: float | None = None,
    message: str = "",
) -> Result:
    """The Result of a run: what was measured, or what can be read off the finished folder."""
    facts = describe_run(
        folder or output.path, model=str(output.path), base_model=output.name, seconds=time.monotonic() - began
    )
    values = (measured.model_dump() if measured else {}) | {k: v for k, v in facts.items() if v is not None}
    return Result.model_validate(
        {
            **values,
            "command": "compress",
            "message": message,
            "baseline": output.name if measured else None,
            "predicted_kl": predicted,
        }
    )
