"""`compress`: a live model, in place; and the steps that it shares with the streamed form."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from effllm import hf
from effllm.allocation.spending import Priced, price_live
from effllm.checkpoint import resolve
from effllm.data.inputs import BATCH, calibration_batches, folder_batches, modality, refuse_default
from effllm.data.text import Document, load_tokenizer, windows_of
from effllm.errors import EffllmError, UsageError
from effllm.layers.placing import (
    Members,
    Stored,
    by_parameter,
    codec_modules,
    decode_stored,
    encode,
    install,
    refuse_nonfinite,
)
from effllm.method import Codec
from effllm.plans import Plan, load_plan
from effllm.report.progress import track
from effllm.report.remarks import remarks
from effllm.site import Site, unchanged, untied
from effllm.source import Batch, LiveModel, Source, arithmetic, in_dtype
from effllm.surgery import refit_norms, refits_norms
from effllm.train import encode_unit

logger = logging.getLogger(__name__)


def compress(
    model: nn.Module,
    plan: str | Path | dict[str, Any] | Plan = "layerwise-4bit",
    calibration: list[Document] | Tensor | Sequence[Batch] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> nn.Module:
    """Compresses a live model in place; `save_pretrained` then writes a packed folder.

    Args:
        model: any module; blocks and weights are found by structure.
        plan: a preset's name, a YAML file, a dictionary or a `Plan`.
        calibration: texts (or lists of chat messages), the model's main input as one tensor (token ids
            `[sequences, length]`, images `[images, channels, height, width]`), or batches of inputs by name (those of a
            processor); by default what the plan names.
        tokenizer: turns text into tokens; found by the model's own name or path where it is not given.

    Returns:
        `model`, with `model.effllm_report`: site -> the codec it got.

    Raises:
        UsageError: the plan matches no layer, or needs data and none can be had.
        EffllmError: a weight holds NaN or inf.
    """
    if codec_modules(model) or getattr(model, "is_quantized", False):
        raise EffllmError("the model is quantised already; compress the original weights")
    wanted = load_plan(plan)
    source = LiveModel(model)
    refuse_misfit(model, source.sites, wanted)
    batches = _live_batches(model, wanted, calibration, tokenizer) if wanted.needs_data else []
    with tempfile.TemporaryDirectory(prefix="effllm-") as folder:
        priced = price_live(wanted, model, batches, Path(folder)) if wanted.limited or wanted.solves else None
        if priced is not None and wanted.limited:
            original = sum(tensor.nbytes for tensor in untied(model, source.sites).values())
            assigned = priced.solution(model, original, {}).assigned
        else:
            dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
            walked = LiveModel(model, arithmetic(dtype, source.device))
            seen = in_dtype(batches, walked.dtype)
            assigned = wanted.assign(source.sites, {score: score.score(walked, seen) for score in wanted.scores()})
        for line in remarks(model, source.sites, wanted, unchanged(model, source.sites, assigned)):
            logger.warning(line)
        members = by_parameter(source.sites, assigned)
        state = model.state_dict()
        for name in members:
            refuse_nonfinite(name, state[name])
        del state
        stored = _solved(source, priced, assigned, members) if priced is not None and priced.prices is not None else {}
    for name, groups in track(members.items(), "compress"):
        install(model, groups, stored.pop(name) if name in stored else encode(model, groups))
    if refits_norms(model, wanted):
        refit_norms(model, batches)
    hf.mark_compressed(model, source.sites, assigned, wanted)
    for edit in wanted.edits():
        edit.attach(model)
    model.effllm_report = {name: codec.label() for name, codec in assigned.items()}  # type: ignore[assignment]
    return model


def _solved(
    source: Source, priced: Priced, assigned: dict[str, Codec], members: dict[str, Members]
) -> dict[str, Stored]:
    """What is stored for every parameter whose sites have moments."""
    stored: dict[str, Stored] = {}

    def encoded(unit: str) -> dict[str, Tensor]:
        names = [name for name in source.units[unit] if name in stored]
        return {name: decode_stored(source.model, members[name], stored[name]) for name in names}

    compressed = encoded if priced.plan.inputs == "compressed" else None
    for seen in track(priced.again(assigned, compressed), "solve"):
        own = {name: members[name] for name in source.units[seen.unit] if name in members}
        stored |= encode_unit(source.model, own, seen)
    return stored


def _live_batches(
    model: nn.Module,
    plan: Plan,
    calibration: list[Document] | Tensor | Sequence[Batch] | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Sequence[Batch]:
    if isinstance(calibration, Tensor):
        name = getattr(model, "main_input_name", "input")
        return [{name: part} for part in calibration.split(BATCH)]
    if calibration and isinstance(calibration[0], Mapping):
        return cast(Sequence[Batch], calibration)
    path = getattr(getattr(model, "config", None), "name_or_path", "")
    if isinstance(model, PreTrainedModel) and modality(model) != "text":
        if calibration is not None or not path:
            raise UsageError(
                f"plan {plan.name} learns from {model.main_input_name}: pass calibration= as a tensor, or as batches by name"
            )
        refuse_default(plan, model)
        return folder_batches(plan.calibration, model, resolve(path))
    if tokenizer is None and not path:
        raise UsageError(f"plan {plan.name} needs calibration text: pass tokenizer=, or calibration= as token ids")
    tokenizer = tokenizer or load_tokenizer(path)
    settings = plan.calibration
    if calibration is None:
        return calibration_batches(settings, tokenizer)
    texts = cast(list[Document], calibration)
    windows = windows_of(tokenizer, texts, settings.samples, settings.sequence_length, "calibration=")
    return [{"input_ids": part} for part in windows.split(BATCH)]


def refuse_misfit(model: nn.Module, sites: list[Site], plan: Plan) -> None:
    """Refuses a plan that does not fit the model, before any data are read: its globs, and its edits.

    Raises:
        UsageError, EffllmError: as `Plan.options` and `Edit.attach`.
    """
    plan.options(sites)
    for edit in plan.edits():
        edit.attach(model)
        edit.detach(model)
