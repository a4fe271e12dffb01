"""`compress`: a live model, in place; and the steps that it shares with the streamed form."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from effllm import hf
from effllm.data.text import Document, load_tokenizer, token_windows, windows_of
from effllm.errors import EffllmError, UsageError
from effllm.method import Codec
from effllm.plans import Calibration, Plan, load_plan
from effllm.report.progress import track
from effllm.site import Site, norms_with_statistics, unchanged
from effllm.source import Batch, LiveModel

BATCH = 8  # calibration sequences per forward: part of the result's bits, so fixed
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
    if hf.codec_modules(model) or getattr(model, "is_quantized", False):
        raise EffllmError("the model is quantised already; compress the original weights")
    wanted = load_plan(plan)
    source = LiveModel(model)
    wanted.options(source.sites)  # a plan that does not fit is refused before any text is read
    batches = _live_batches(model, wanted, calibration, tokenizer) if wanted.needs_data else []
    assigned = wanted.assign(source.sites, {score: score.score(source, batches) for score in wanted.scores()})
    report_unchanged(model, assigned)
    members = hf.by_parameter(source.sites, assigned)
    state = model.state_dict()
    for name in members:
        refuse_nonfinite(name, state[name])
    del state
    for groups in track(members.values(), "compress"):
        hf.install(model, groups, encode(model, groups))
    hf.mark_compressed(model, assigned, wanted.model_dump(mode="json", exclude_defaults=True))
    model.effllm_report = {name: codec.label() for name, codec in assigned.items()}  # type: ignore[assignment]
    return model


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
    if tokenizer is None and not path:
        raise UsageError(f"plan {plan.name} needs calibration text: pass tokenizer=, or calibration= as token ids")
    tokenizer = tokenizer or load_tokenizer(path)
    settings = plan.calibration
    if calibration is None:
        return calibration_batches(settings, tokenizer)
    texts = cast(list[Document], calibration)
    windows = windows_of(tokenizer, texts, settings.samples, settings.sequence_length, "calibration=")
    return [{"input_ids": part} for part in windows.split(BATCH)]


def calibration_batches(settings: Calibration, tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
    """The plan's calibration text as batches of token ids `[up to 8, sequence_length]`."""
    tokens = token_windows(tokenizer, settings.sources, settings.samples, settings.sequence_length)
    logger.info("calibration: %s, %d x %d tokens", ", ".join(settings.sources), *tokens.shape)
    return [{"input_ids": part} for part in tokens.split(BATCH)]


def report_unchanged(model: nn.Module, assigned: dict[str, Codec]) -> None:
    """Says which large weights no codec touches, and which statistics no longer fit the weights."""
    for name, share, why in unchanged(model, assigned):
        logger.warning("stays as it is: %s, %.1f %% of the bytes (%s)", name, 100 * share, why)
    norms = norms_with_statistics(model)
    if norms:
        logger.warning(
            "the running statistics of %d batch norms are those of the original weights: not refitted", norms
        )


def refuse_nonfinite(name: str, tensor: Tensor) -> None:
    """Raises EffllmError where a tensor holds NaN or inf."""
    if not bool(torch.isfinite(tensor).all()):
        raise EffllmError(
            f"{name} holds NaN or inf as {tensor.dtype}: the checkpoint is damaged, its training diverged, or the dtype "
            "is too narrow; download it again, or try another dtype"
        )


@torch.no_grad()
def encode(model: nn.Module, groups: dict[Codec, list[Site]]) -> dict[Codec, dict[str, Tensor]]:
    """What each codec stores for the sites of one parameter; stacked `[experts, ...]` where they are experts.

    Raises:
        EffllmError: a weight holds NaN or inf.
    """
    stored = {}
    for codec, sites in groups.items():
        encoded = []
        for site in sites:
            weight = site.matrix(model)
            refuse_nonfinite(site.parameter, weight)
            encoded.append(codec.encode(weight))
        single = sites[0].expert is None
        stored[codec] = encoded[0] if single else {key: torch.stack([e[key] for e in encoded]) for key in encoded[0]}
    return stored
