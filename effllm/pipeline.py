"""`compress`: a live model, in place; and the steps that it shares with the streamed form."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from effllm import hf
from effllm.allocation.spending import Priced, price_live
from effllm.data.inputs import live_batches
from effllm.data.text import Document
from effllm.edits import applied, restructure
from effllm.errors import EffllmError, UsageError
from effllm.journal import attach_edits
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
from effllm.progress import track
from effllm.report.remarks import remarks
from effllm.site import find_sites, unchanged, untied
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
    refuse_misfit(model, wanted)
    batches = live_batches(model, wanted, calibration, tokenizer) if wanted.needs_data else []
    restructure(model, wanted.structure(), batches)
    source = LiveModel(model)
    with tempfile.TemporaryDirectory(prefix="effllm-") as folder:
        priced = price_live(wanted, model, batches, Path(folder)) if wanted.priced else None
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
    attach_edits(model, wanted.edits(), structure=False)
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


def refuse_misfit(model: nn.Module, plan: Plan) -> None:
    """Refuses a plan that does not fit the model, before any data are read: its globs, and its edits.

    Raises:
        UsageError, EffllmError: as `Plan.options` and `Edit.attach`; a plan that edits the structure and encodes nothing.
    """
    with applied(model, plan.edits()):
        options = plan.options(find_sites(model))
    if plan.structure() and not options:
        raise UsageError(
            f"plan {plan.name} changes the structure and encodes no weight: programs that do not know effllm would open the "
            "folder with random weights instead of refusing it; add a step with a codec"
        )
