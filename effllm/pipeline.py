"""`compress`: a live model, in place; and the steps that it shares with the streamed form."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from effllm import hf
from effllm.data import Document, load_tokenizer, token_windows, windows_of
from effllm.errors import EffllmError, UsageError
from effllm.layers import codec_layer
from effllm.method import Codec
from effllm.plans import Calibration, Plan, load_plan
from effllm.report.progress import track
from effllm.site import matrix, unchanged
from effllm.source import LiveModel

BATCH = 8  # calibration sequences per forward: part of the result's bits, so fixed
logger = logging.getLogger(__name__)


def compress(
    model: nn.Module,
    plan: str | Path | dict[str, Any] | Plan = "layerwise-4bit",
    calibration: list[Document] | Tensor | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> nn.Module:
    """Compresses a live model in place; `save_pretrained` then writes a packed folder.

    Args:
        model: any module; blocks and weights are found by structure.
        plan: a preset's name, a YAML file, a dictionary or a `Plan`.
        calibration: texts (or lists of chat messages), or token ids `[sequences, length]`; by default what the plan names.
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
    for name in assigned:
        refuse_nonfinite(f"{name}.weight", matrix(model.get_submodule(name)))
    sites = {site.name: site for site in source.sites}
    for name, codec in track(assigned.items(), "compress"):
        module = model.get_submodule(name)
        hf.replace(model, sites[name], codec_layer(module, codec, encode(name, module, codec)))
    hf.mark_compressed(model, assigned, wanted.model_dump(mode="json", exclude_defaults=True))
    model.effllm_report = {name: codec.label() for name, codec in assigned.items()}  # type: ignore[assignment]
    return model


def _live_batches(
    model: nn.Module,
    plan: Plan,
    calibration: list[Document] | Tensor | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> list[Tensor]:
    if isinstance(calibration, Tensor):
        return list(calibration.split(BATCH))
    path = getattr(getattr(model, "config", None), "name_or_path", "")
    if tokenizer is None and not path:
        raise UsageError(f"plan {plan.name} needs calibration text: pass tokenizer=, or calibration= as token ids")
    tokenizer = tokenizer or load_tokenizer(path)
    settings = plan.calibration
    if calibration is None:
        return calibration_batches(settings, tokenizer)
    windows = windows_of(tokenizer, calibration, settings.samples, settings.sequence_length, "calibration=")
    return list(windows.split(BATCH))


def calibration_batches(settings: Calibration, tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """The plan's calibration text as batches of token ids `[up to 8, sequence_length]`."""
    tokens = token_windows(tokenizer, settings.sources, settings.samples, settings.sequence_length)
    logger.info("calibration: %s, %d x %d tokens", ", ".join(settings.sources), *tokens.shape)
    return list(tokens.split(BATCH))


def report_unchanged(model: nn.Module, assigned: dict[str, Codec]) -> None:
    """Says which large weights no codec touches."""
    for name, share in unchanged(model, assigned):
        logger.warning("stays as it is: %s, %.1f %% of the bytes", name, 100 * share)


def refuse_nonfinite(name: str, tensor: Tensor) -> None:
    """Raises EffllmError where a tensor holds NaN or inf."""
    if not bool(torch.isfinite(tensor).all()):
        raise EffllmError(
            f"{name} holds NaN or inf as {tensor.dtype}: the checkpoint is damaged, its training diverged, or the dtype "
            "is too narrow; download it again, or try another dtype"
        )


@torch.no_grad()
def encode(name: str, module: nn.Module, codec: Codec) -> dict[str, Tensor]:
    """What `codec` stores for a module's weight.

    Raises:
        EffllmError: the weight holds NaN or inf.
    """
    weight = matrix(module)
    refuse_nonfinite(f"{name}.weight", weight)
    return codec.encode(weight)
