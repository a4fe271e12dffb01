"""`compress_folder`: inspect, collect, choose, rewrite, check, with one unit of the model in memory at a time."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

import effllm
from effllm import hf
from effllm.allocation.spending import Priced, price_folder
from effllm.checkpoint import INDEX, Checkpoint, read_config, read_header, resolve
from effllm.checkpoint.checksum import checksum, to_text
from effllm.data.inputs import folder_batches, refuse_default
from effllm.data.text import text_identity
from effllm.errors import EffllmError
from effllm.journal import RunJournal, edit_entries, entries, shapes
from effllm.layers.placing import by_parameter, decode_stored, read_stored, return_freed_memory
from effllm.measure.evaluate import evaluate, has_held_out
from effllm.measure.result import Result, describe_run
from effllm.measure.work import refuse_too_large, working_memory
from effllm.method import Codec, Score
from effllm.pipeline import refuse_misfit
from effllm.plans import Plan, load_plan
from effllm.report.model_folder import model_card, other_files
from effllm.report.progress import track
from effllm.report.remarks import remarks
from effllm.shards import clear, shard_units, unit_tensors, write_shard
from effllm.site import unchanged, untied
from effllm.source import Source, StoredModel, arithmetic
from effllm.statistics.again import Seen

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """One folder-to-folder compression: what is asked for, and where it goes."""

    name: str
    checkpoint: Checkpoint
    plan: Plan
    out: Path
    threads: int
    seed: int = 0

    @property
    def partial(self) -> Path:
        """Where the output grows until it is complete."""
        return self.out.with_name(self.out.name + ".partial")

    def key(self, source: StoredModel) -> str:
        """Identifies the output's bytes: source, plan, dtype, version, and threads where floats are summed."""
        facts = {
            "source": self.checkpoint.identity(),
            "plan": self.plan.model_dump(mode="json", exclude={"name", "description"}),
            "dtype": str(source.dtype),
            "version": effllm.__version__,
            "threads": self.threads if self.plan.needs_data else None,
            "text": [text_identity(text) for text in self.plan.calibration.sources] if self.plan.needs_data else None,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


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
    run = Run(name, checkpoint, wanted, target.resolve(), torch.get_num_threads(), seed)
    stored = StoredModel(checkpoint, dtype, device)
    refuse_misfit(stored.model, stored.sites, wanted)
    refuse_default(wanted, stored.model)
    needed = working_memory(stored.model, stored.sites, wanted, stored.dtype)
    refuse_too_large(needed, max_memory, wanted)
    key = run.key(stored)
    if _finished(run, key, overwrite):
        RunJournal.remove(run.out)
        return _result(run, began, None, "already done: nothing was changed")
    if overwrite:
        RunJournal.forget(run.partial)
    other_files(checkpoint.folder)
    _check_disk(run, largest_bytes(stored, wanted.options(stored.sites)) + sum(stored.unloaded.values()))
    measure = wanted.needs_data if check is None else check
    measure = measure and has_held_out(stored.model, target) and (bool(check) or _fits(checkpoint))
    try:
        with _explain_full_disk(run):
            result = _carry_out(run, stored, key, measure, overwrite, began)
    except FileNotFoundError:
        if not _finished(run, key, overwrite=False):
            raise
        return _result(run, began, None, "finished by another process")
    return result


def _carry_out(run: Run, source: StoredModel, key: str, measure: bool, overwrite: bool, began: float) -> Result:
    journal = RunJournal(run.partial, key)
    if _finished(run, key, overwrite):
        journal.discard()
        return _result(run, began, None, "finished by another process")
    try:
        assigned, priced = _choose(run, source, journal)
        left = unchanged(source.model, source.sites, assigned)
        for line in remarks(source.model, source.sites, run.plan, left):
            logger.warning(line)
        for name in source.unloaded:
            logger.warning("not loaded by the class, kept byte for byte: %s", name)
        shards = _rewrite(run, source, assigned, priced, journal)
    except EffllmError:
        journal.discard()
        raise
    with journal.claim("finish"):
        _write_index(run, [run.partial / shard["file"] for shard in shards])
        checksums = to_text(number for shard in shards for number in shard["checksums"])
        _write_config(run, source, assigned, key, checksums)
        for name, file in other_files(run.checkpoint.folder).items():
            shutil.copyfile(file, run.partial / name)
        measured = evaluate(run.partial, baseline=run.checkpoint.folder) if measure else None
        predicted = priced.predicted(assigned) if priced else None
        result = _result(run, began, measured, folder=run.partial, predicted=predicted)
        (run.partial / "README.md").write_text(model_card(run.name, run.checkpoint.folder, result), encoding="utf-8")
        _publish(run, overwrite)
    RunJournal.remove(run.out)
    return result


def largest_bytes(source: Source, options: dict[str, tuple[Codec, ...]]) -> int:
    """An upper bound of the output's tensor bytes: each site at the largest option that the plan may choose."""
    state = untied(source.model, source.sites)
    total: int = sum(tensor.nbytes for tensor in state.values())
    for site in source.sites:
        if site.name in options:
            dense = site.size * state[site.parameter].itemsize
            total += max(codec.stored_bytes(site.shape) for codec in options[site.name]) - dense
    return total


def _finished(run: Run, key: str, overwrite: bool) -> bool:
    """Whether `out` is this very output; raises where it holds something else."""
    if not run.out.exists() or (run.out.is_dir() and not any(run.out.iterdir())):
        return False
    ours = (run.out / "config.json").is_file() and _quantization(run.out).get("quant_method") == "effllm"
    if ours and (_quantization(run.out).get("source") or {}).get("key") == key and not overwrite:
        return True
    if not ours:
        raise EffllmError(f"{run.out} holds something that effllm did not write; choose another --out")
    if not overwrite:
        raise EffllmError(f"{run.out} holds another effllm model; pass --overwrite to replace it, or another --out")
    return False


def _fits(checkpoint: Checkpoint) -> bool:
    """Whether original and result can be in memory together, to be measured."""
    needed, free = 2.5 * checkpoint.stored_bytes, psutil.virtual_memory().available
    if needed > free:
        logger.warning("the result is not measured: that takes %.1f GB, and %.1f GB are free", needed / 1e9, free / 1e9)
    return bool(needed <= free)


def _quantization(folder: Path) -> dict[str, Any]:
    return read_config(folder).get("quantization_config") or {}


def _check_disk(run: Run, needed: int) -> None:
    done = sum(file.stat().st_size for file in run.partial.glob("*.safetensors")) if run.partial.exists() else 0
    existing = next(parent for parent in run.out.parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed - done > free:
        raise EffllmError(
            f"{existing} has {free / 1e6:,.1f} MB free, and the output needs up to {(needed - done) / 1e6:,.1f} MB more; "
            "free some, or choose another --out"
        )


@contextlib.contextmanager
def _explain_full_disk(run: Run) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise EffllmError(
            f"no room left in {run.out.parent} ({os.strerror(error.errno)}); free some and give the same command: what is "
            f"finished in {run.partial.name} is kept"
        ) from None


def _choose(run: Run, source: StoredModel, journal: RunJournal) -> tuple[dict[str, Codec], Priced | None]:
    """The codec of every site, and the prices, where the plan has some; what an earlier run recorded is not done again."""
    priced = None
    if run.plan.limited or run.plan.solves:
        priced = price_folder(run.plan, run.checkpoint, source.device, run.seed)
    if priced is not None and run.plan.limited:
        return priced.solution(source.model, run.checkpoint.stored_bytes, source.unloaded).assigned, priced
    ranks: dict[Score, dict[str, float]] = {}
    for score in run.plan.scores():
        with journal.claim(f"score-{score.name()}"):
            line = journal.find("score", score.label())
            if line is None:
                settings, folder = run.plan.calibration, run.checkpoint.folder
                if score.needs_data:
                    walked = StoredModel(run.checkpoint, arithmetic(source.dtype, source.device), source.device)
                    values = score.score(walked, folder_batches(settings, walked.model, folder))
                else:
                    values = score.score(source, [])
                journal.add("score", score.label(), values=values)
            else:
                values = line["values"]
        ranks[score] = values
    return run.plan.assign(source.sites, ranks), priced


def _rewrite(
    run: Run, source: StoredModel, assigned: dict[str, Codec], priced: Priced | None, journal: RunJournal
) -> list[dict[str, Any]]:
    """Writes one shard a unit, skipping those that are done; returns the journal's lines once every one stands."""
    units, members = shard_units(source, run.plan), by_parameter(source.sites, assigned)
    files = {unit: f"model-{i:05d}-of-{len(units):05d}.safetensors" for i, unit in enumerate(units, start=1)}

    def written(unit: str) -> dict[str, Tensor]:
        with journal.claim(f"unit-{units.index(unit)}"):
            return load_file(run.partial / journal.find("unit", unit)["file"])  # type: ignore[index]

    def decoded(unit: str) -> dict[str, Tensor]:
        tensors = written(unit)
        names = members.keys() & set(source.units[unit])
        model = priced.source.model if priced else source.model  # whose block is resident
        return {n: decode_stored(model, members[n], read_stored(members[n], tensors)) for n in names}

    def visits(pending: list[str]) -> Iterator[tuple[str, Seen | None]]:
        """Units with what came by at them, in the order in which they come by."""
        visited = set()
        if priced is not None and priced.prices is not None:
            if run.plan.inputs == "compressed":
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
                    tensors = unit_tensors(source, run.plan, unit, members, seen, written)
                    digest = write_shard(run.partial / files[unit], tensors)
                    checksums = [checksum(name, tensor) for name, tensor in tensors.items()]
                    journal.add("unit", unit, file=files[unit], sha256=digest, checksums=checksums)
        waiting = True


def _write_index(run: Run, files: list[Path]) -> None:
    headers = {file.name: read_header(file) for file in files}
    total = sum(tensor.nbytes for header in headers.values() for tensor in header.values())
    weight_map = {name: file for file, header in headers.items() for name in header}
    _write_json(
        run.partial / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    )


def _write_config(run: Run, source: StoredModel, assigned: dict[str, Codec], key: str, checksums: str) -> None:
    config = {k: v for k, v in run.checkpoint.config.items() if k not in ("torch_dtype", "auto_map")}
    config["dtype"] = str(source.dtype).removeprefix("torch.")
    quantization = hf.EffllmConfig(
        entries(assigned),
        shapes(source.sites, assigned),
        plan=run.plan.model_dump(mode="json", exclude_defaults=True),
        source={"model": run.name, "key": key},
        checksums=checksums,
        edits=edit_entries(run.plan.edits()),
    )
    _write_json(run.partial / "config.json", {**config, "quantization_config": quantization.to_dict()})


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _publish(run: Run, overwrite: bool) -> None:
    """Gives the finished folder its name. The earlier output, if any, is gone only after that."""
    for stray in run.partial.glob("*.tmp"):
        clear(stray)
    for file in run.partial.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    if overwrite and run.out.exists():
        old = Path(tempfile.mkdtemp(prefix=run.out.name + ".old-", dir=run.out.parent))
        run.out.rename(old)
        run.partial.rename(run.out)
        shutil.rmtree(old)
    else:
        run.partial.rename(run.out)


def _result(
    run: Run, began: float, measured: Result | None, message: str = "", folder: Path | None = None,
    predicted: float | None = None,
) -> Result:  # fmt: skip
    """The Result of a run: what was measured, or what can be read off the finished folder."""
    finished = folder or run.out
    facts = describe_run(finished, model=str(run.out), base_model=run.name, seconds=time.monotonic() - began)
    values = (measured.model_dump() if measured else {}) | {k: v for k, v in facts.items() if v is not None}
    return Result.model_validate(
        {
            **values,
            "command": "compress",
            "message": message,
            "baseline": run.name if measured else None,
            "predicted_kl": predicted,
        }
    )
