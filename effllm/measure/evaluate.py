"""Accuracy on held-out data, and how far a model is from its original: text here, images in `measure.images`."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from effllm.checkpoint import Checkpoint, read_config, resolve
from effllm.checkpoint.skeleton import load_config, model_class, stored_dtype
from effllm.data.inputs import Modality, modality
from effllm.data.text import EVALUATION_TEXTS, load_tokenizer, token_windows
from effllm.errors import EffllmError, UsageError
from effllm.loading import load
from effllm.measure.images import compare_images, held_out
from effllm.measure.result import Result, describe_run, standard_error
from effllm.progress import track
from effllm.source import arithmetic

WINDOWS = 32  # of text, where the caller names no number
CHUNK = 64  # tokens whose distributions over the vocabulary are held in fp32 at once
logger = logging.getLogger(__name__)


@dataclass
class Comparison:
    """Per-window means `[windows]` (fp64) over the predicted tokens; the baseline's fields are None without one."""

    nll: Tensor
    baseline_nll: Tensor | None
    kl: Tensor | None
    agreement: Tensor | None
    tokens: int

    def figures(self) -> dict[str, Any]:
        """The Result's fields. Standard errors are over windows; paired, where two models are compared."""
        loss = self.nll.mean().item()
        found: dict[str, Any] = {
            "perplexity": math.exp(loss),
            "perplexity_stderr": math.exp(loss) * standard_error(self.nll),
            "perplexity_tokens": self.tokens,
        }
        if self.kl is not None and self.agreement is not None and self.baseline_nll is not None:
            found |= {
                "baseline_perplexity": math.exp(self.baseline_nll.mean().item()),
                "kl": self.kl.mean().item(),
                "kl_stderr": standard_error(self.kl),
                "kl_tokens": self.tokens,
                "top1_agreement": self.agreement.mean().item(),
                "top1_agreement_stderr": standard_error(self.agreement),
                "top1_agreement_tokens": self.tokens,
            }
        return found


@torch.no_grad()
def compare(model: PreTrainedModel, windows: Tensor, baseline: PreTrainedModel | None = None) -> Comparison:
    """Runs `model` (and `baseline`) over token ids `[windows, length]`, predicting every token from those before it."""
    rows: list[list[float]] = []
    for window in track(windows, "eval"):
        ids = window.unsqueeze(0)
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits[0, :-1]
        reference = None
        if baseline is not None:
            reference = baseline(input_ids=ids.to(baseline.device), use_cache=False).logits[0, :-1]
        rows.append(_window(logits, window[1:], reference))
    columns = torch.tensor(rows, dtype=torch.float64).t()
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    if baseline is None:
        return Comparison(columns[0], None, None, None, tokens)
    return Comparison(*columns, tokens)  # type: ignore[call-arg]


def _window(logits: Tensor, targets: Tensor, reference: Tensor | None) -> list[float]:
    """Means over one window: nll, and with a reference also its nll, the KL from it, and the top-1 agreement."""
    sums = torch.zeros(1 if reference is None else 4, dtype=torch.float64)
    for start in range(0, len(targets), CHUNK):
        part = slice(start, start + CHUNK)
        log_q = logits[part].float().log_softmax(-1).cpu()
        target = targets[part].unsqueeze(1)
        sums[0] -= log_q.gather(1, target).double().sum()
        if reference is not None:
            log_p = reference[part].float().log_softmax(-1).cpu()
            sums[1] -= log_p.gather(1, target).double().sum()
            sums[2] += (log_p.exp() * (log_p - log_q)).sum(-1).double().sum()
            sums[3] += (log_p.argmax(-1) == log_q.argmax(-1)).double().sum()
    return (sums / len(targets)).tolist()  # type: ignore[no-any-return]


def measured_on(cls: type[PreTrainedModel], config: PreTrainedConfig) -> Modality | None:
    """What `evaluate` measures a class on: `text` a decoder of text, `images` an image classifier, None any other."""
    kind = modality(cls)
    if kind == "text":
        return kind if cls.can_generate() and not config.is_encoder_decoder else None
    return kind if kind == "images" and "ForImageClassification" in cls.__name__ else None


def has_held_out(model: PreTrainedModel, out: Path) -> bool:
    """Whether the package holds data that no plan has seen to measure `model` on; says so where it does not."""
    kind = measured_on(type(model), model.config)
    if kind == "images":
        logger.warning(
            "not measured: that takes labelled images that the plan has not seen; effllm eval %s --images SOURCE", out
        )
    elif kind is None:
        logger.warning("not measured: %s is neither a decoder of text nor an image classifier", type(model).__name__)
    return kind == "text"


def evaluate(
    model: str | Path,
    baseline: str | Path | None = None,
    text: list[str] | None = None,
    samples: int | None = None,
    sequence_length: int = 512,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    images: list[str] | None = None,
) -> Result:
    """Measures a model folder: perplexity or accuracy, KL and top-1 agreement with `baseline`, bytes, memory and speed.

    Args:
        model: a folder (compressed or plain), `demo`, an alias or a hub id.
        baseline: the original to compare with; by default `demo`, where the folder was made from it.
        text: sources as in `token_windows`; `default` is the held-out slice in the package.
        samples: windows of text (32), or images (all).
        sequence_length: tokens a window.
        device: where to compute.
        dtype: dtype of the arithmetic; by default the checkpoint's own, or fp32 on a CPU without instructions for that.
        revision: hub revision of `model`.
        images: sources as in `labelled_batches`, for an image classifier.

    Raises:
        UsageError: the model's class cannot be measured, or not on what was given.
        EffllmError: the tokenizers or classes of model and baseline differ, or see `effllm.load`.
    """
    began = time.monotonic()
    folder = resolve(model, revision)
    kind = _checked_kind(folder, text, images)
    facts = describe_run(folder, model=str(model), base_model=None, seconds=0.0)
    name = baseline or (facts["base_model"] if facts["base_model"] == "demo" else None)
    other = resolve(name) if name is not None else None
    stored = stored_dtype(Checkpoint.open(folder))
    settings: dict[str, Any] = {"device_map": device, "dtype": dtype or arithmetic(stored, device)}
    if kind == "images":
        batches, shape = held_out(folder, other, images or [], samples)
        running = measure_run(folder, device, ["--image", *map(str, shape)])
        reference = load(other, **settings) if other is not None else None
        figures = compare_images(load(folder, **settings), batches, reference).figures() | {"images": images}
    else:
        sources = text or ["default"]
        tokenizer = load_tokenizer(folder)
        windows = token_windows(tokenizer, sources, samples or WINDOWS, sequence_length, packaged=EVALUATION_TEXTS)
        if other is not None and load_tokenizer(other).get_vocab() != tokenizer.get_vocab():
            raise EffllmError(f"{name} and {model} have different tokenizers; name the model it was compressed from")
        running = measure_run(folder, device)
        reference = load(other, **settings) if other is not None else None
        figures = compare(load(folder, **settings), windows, reference).figures()
        figures |= {"text": sources, "sequence_length": sequence_length}
    return Result.model_validate(
        {
            **facts,
            **figures,
            **running,
            "command": "eval",
            "baseline": str(name) if name is not None else None,
            "seconds": time.monotonic() - began,
        }
    )


def _checked_kind(folder: Path, text: list[str] | None, images: list[str] | None) -> Modality:
    """What the model in `folder` is measured on, after checking that the caller gave that."""
    config = read_config(folder)
    cls = model_class(config)
    kind = measured_on(cls, load_config(config))
    if kind is None:
        raise UsageError(f"{folder} holds a {cls.__name__}; eval measures decoders of text and image classifiers")
    if kind == "images" and (text or not images):
        raise UsageError(
            f"{folder} holds a {cls.__name__}, an image classifier: --images SOURCE of labelled images, no --text"
        )
    if kind == "text" and images:
        raise UsageError(f"{folder} holds a {cls.__name__}, which takes text: --text, no --images")
    return kind


def measure_run(folder: Path, device: str = "cpu", extra: Iterable[str] = ()) -> dict[str, Any]:
    """Peak memory and speed of a fresh process that loads the model and runs it (see `measure.run`)."""
    command = [sys.executable, "-m", "effllm.measure.run", str(folder), "--device", device, *extra]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EffllmError(f"{folder} could not be run in a fresh process: {reason}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))
