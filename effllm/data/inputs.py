"""What a model takes, and the plan's calibration data as batches of it: text, images and speech are told apart here."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import effllm
from effllm.checkpoint import Checkpoint, resolve
from effllm.data.images import image_batches
from effllm.data.own import own_windows
from effllm.data.pairs import holds_pairs, pair_batches
from effllm.data.speech import speech_batches
from effllm.data.text import Document, load_tokenizer, split_weight, text_identity, token_windows, windows_of
from effllm.errors import UsageError
from effllm.plans import Calibration, Plan
from effllm.resume import run_key
from effllm.source import Batch

BATCH = 8  # calibration inputs per forward: part of the result's bits, so fixed
Modality = Literal["text", "images", "speech"]
MODALITIES: dict[str, Modality] = {
    "input_ids": "text",
    "pixel_values": "images",
    "input_features": "speech",
    "input_values": "speech",
}
logger = logging.getLogger(__name__)


def modality(model: PreTrainedModel | type[PreTrainedModel]) -> Modality | None:
    """What a model or class takes; None where it is neither text, images nor speech, or images and text together."""
    kind = MODALITIES.get(model.main_input_name)
    return None if kind == "images" and model.can_generate() else kind


def refuse_default(plan: Plan, model: PreTrainedModel) -> None:
    """Raises UsageError where `plan` learns from data that effllm has no default of for `model`."""
    kind = modality(model)
    if not plan.needs_data or kind == "text" or (kind and "default" not in plan.calibration.sources):
        return
    remedy = "--score zd, or --plan uniform-4bit"
    if kind is None:
        raise UsageError(
            f"plan {plan.name} learns from data, and effllm cannot make the inputs of {type(model).__name__}: {remedy}"
        )
    what = "images" if kind == "images" else ".wav files"
    raise UsageError(
        f"plan {plan.name} learns from {kind}, and effllm has none of its own for {type(model).__name__}: --calibration "
        f"FOLDER of {what}, or {remedy}"
    )


def calibration_batches(
    settings: Calibration, tokenizer: PreTrainedTokenizerBase, folder: Path | None = None
) -> list[Batch]:
    """Calibration text as batches of token ids `[up to 8, sequence_length]`; the model in `folder` may write its own."""
    own = partial(own_windows, folder, tokenizer) if folder is not None else None
    tokens = token_windows(tokenizer, settings.sources, settings.samples, settings.sequence_length, own=own)
    logger.info("calibration: %s, %d x %d tokens", ", ".join(settings.sources), *tokens.shape)
    return [{"input_ids": part} for part in tokens.split(BATCH)]


def data_key(
    checkpoint: Checkpoint, calibration: Calibration | None, device: torch.device, seed: int, **facts: Any
) -> str:
    """Identifies what is found in a checkpoint on calibration data (None where it takes none), and `facts` beside."""
    return run_key(
        source=checkpoint.identity(),
        calibration=calibration.model_dump(mode="json") if calibration else None,
        text=[text_identity(text) for text in calibration.sources] if calibration else None,
        device=device.type,
        threads=torch.get_num_threads(),
        version=effllm.__version__,
        seed=seed,
        **facts,
    )


def folder_batches(settings: Calibration, model: PreTrainedModel, folder: Path) -> list[Batch]:
    """Calibration data for `model` as batches of its inputs, in its dtype, by the tokenizer or processor of `folder`.

    Raises:
        UsageError, EffllmError: see `token_windows`, `pair_batches`, `image_batches`, `speech_batches`.
    """
    kind = modality(model)
    if kind == "text":
        return _text_and_pairs(settings, model, folder)
    if kind == "images":
        batches = list(image_batches(folder, settings.sources, settings.samples, BATCH))
    else:
        batches = speech_batches(folder, settings.sources, settings.samples, model.main_input_name)
    count = sum(len(batch[model.main_input_name]) for batch in batches)
    logger.info(
        "calibration: %s, %d %s", ", ".join(settings.sources), count, "images" if kind == "images" else "recordings"
    )
    return [{name: _cast(tensor, model) for name, tensor in batch.items()} for batch in batches]


def live_batches(
    model: nn.Module,
    plan: Plan,
    calibration: list[Document] | Tensor | Sequence[Batch] | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Sequence[Batch]:
    """Calibration data for a live model, in the forms that `effllm.compress` takes; by default what the plan names.

    Raises:
        UsageError: the plan learns from data, and none were given or can be found for this model.
    """
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


def _text_and_pairs(settings: Calibration, model: PreTrainedModel, folder: Path) -> list[Batch]:
    """Text, and images with text where a source is a folder of them."""
    weighted = [(source, *split_weight(source)) for source in settings.sources]
    total = sum(weight for *_, weight in weighted)
    text = {source: weight for source, name, weight in weighted if not holds_pairs(name)}
    batches: list[Batch] = []
    for source, name, weight in weighted:
        if source not in text:
            found = pair_batches(folder, name, max(1, round(settings.samples * weight / total)))
            logger.info("calibration: %s, %d images with text", source, len(found))
            batches += [{key: _cast(tensor, model) for key, tensor in batch.items()} for batch in found]
    if text:
        count = max(1, round(settings.samples * sum(text.values()) / total))
        rest = settings.model_copy(update={"sources": list(text), "samples": count})
        batches += calibration_batches(rest, load_tokenizer(folder), folder)
    return batches


def _cast(tensor: Tensor, model: PreTrainedModel) -> Tensor:
    return tensor.to(model.dtype) if tensor.is_floating_point() else tensor
