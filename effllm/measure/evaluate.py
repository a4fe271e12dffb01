"""Accuracy on held-out text: perplexity, and how far a model is from its original."""

from __future__ import annotations

import json
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
from transformers import PreTrainedModel

from effllm.checkpoint import resolve
from effllm.data.text import EVALUATION_TEXT, load_tokenizer, token_windows
from effllm.errors import EffllmError
from effllm.loading import load
from effllm.measure.result import Result, describe_run
from effllm.report.progress import track

CHUNK = 64  # tokens whose distributions over the vocabulary are held in fp32 at once


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


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of per-window values `[windows]`; 0 for a single window."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0


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


def evaluate(
    model: str | Path,
    baseline: str | Path | None = None,
    text: list[str] | None = None,
    samples: int | None = 32,
    sequence_length: int = 512,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> Result:
    """Measures a model folder: perplexity, KL and top-1 agreement with `baseline`, bytes, peak memory and speed.

    Args:
        model: a folder (compressed or plain), `demo`, an alias or a hub id.
        baseline: the original to compare with; by default `demo`, where the folder was made from it.
        text: sources as in `token_windows`; `default` is the held-out slice in the package.
        samples: windows of text; None for all.
        sequence_length: tokens a window.
        device: where to compute.
        dtype: dtype of the arithmetic; the checkpoints' own by default.
        revision: hub revision of `model`.

    Raises:
        EffllmError: the tokenizers of model and baseline differ, or see `effllm.load`.
    """
    began = time.monotonic()
    folder = resolve(model, revision)
    facts = describe_run(folder, model=str(model), base_model=None, seconds=0.0)
    name = baseline or (facts["base_model"] if facts["base_model"] == "demo" else None)
    sources = text or ["default"]
    tokenizer = load_tokenizer(folder)
    windows = token_windows(tokenizer, sources, samples, sequence_length, default=EVALUATION_TEXT)
    settings: dict[str, Any] = {"device_map": device} | ({} if dtype is None else {"dtype": dtype})
    running = measure_run(folder, device)
    reference = None
    if name is not None:
        reference_folder = resolve(name)
        if load_tokenizer(reference_folder).get_vocab() != tokenizer.get_vocab():
            raise EffllmError(f"{name} and {model} have different tokenizers; name the model it was compressed from")
        reference = load(reference_folder, **settings)
    comparison = compare(load(folder, **settings), windows, reference)
    return Result.model_validate(
        {
            **facts,
            **comparison.figures(),
            **running,
            "command": "eval",
            "baseline": str(name) if name is not None else None,
            "text": sources,
            "sequence_length": sequence_length,
            "seconds": time.monotonic() - began,
        }
    )


def measure_run(folder: Path, device: str = "cpu", extra: Iterable[str] = ()) -> dict[str, Any]:
    """Peak memory and decode speed of a fresh process that loads the model and generates (see `measure.run`)."""
    command = [sys.executable, "-m", "effllm.measure.run", str(folder), "--device", device, *extra]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EffllmError(f"{folder} could not be run in a fresh process: {reason}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))
