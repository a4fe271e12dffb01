"""Accuracy on images: how often a classifier is right, and how far it is from its original."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from effllm.checkpoint import read_config
from effllm.checkpoint.skeleton import load_config
from effllm.data.images import labelled_batches
from effllm.errors import EffllmError
from effllm.measure.result import standard_error
from effllm.progress import track

BATCH = 32


@dataclass
class ImageComparison:
    """One value an image `[images]` (fp64): right or wrong as 1 or 0; the baseline's fields are None without one."""

    correct: Tensor
    baseline_correct: Tensor | None = None
    kl: Tensor | None = None
    agreement: Tensor | None = None

    def figures(self) -> dict[str, Any]:
        """The Result's fields. Standard errors are over images."""
        found: dict[str, Any] = {
            "accuracy": self.correct.mean().item(),
            "accuracy_stderr": standard_error(self.correct),
            "accuracy_images": len(self.correct),
        }
        if self.kl is not None and self.agreement is not None and self.baseline_correct is not None:
            change = self.correct - self.baseline_correct
            found |= {
                "baseline_accuracy": self.baseline_correct.mean().item(),
                "accuracy_change": change.mean().item(),
                "accuracy_change_stderr": standard_error(change),
                "kl": self.kl.mean().item(),
                "kl_stderr": standard_error(self.kl),
                "top1_agreement": self.agreement.mean().item(),
                "top1_agreement_stderr": standard_error(self.agreement),
            }
        return found


@torch.no_grad()
def compare_images(
    model: PreTrainedModel,
    batches: Iterable[tuple[dict[str, Tensor], Tensor]],
    baseline: PreTrainedModel | None = None,
) -> ImageComparison:
    """Runs `model` (and `baseline`) over batches of pixels `[n, channels, height, width]` and class numbers `[n]`."""
    parts = []
    for inputs, labels in track(batches, "eval"):
        log_q = _log_probabilities(model, inputs)
        part = [log_q.argmax(-1) == labels]
        if baseline is not None:
            log_p = _log_probabilities(baseline, inputs)
            part += [log_p.argmax(-1) == labels, (log_p.exp() * (log_p - log_q)).sum(-1)]
            part += [log_p.argmax(-1) == log_q.argmax(-1)]
        parts.append(torch.stack([values.double() for values in part]))
    return ImageComparison(*torch.cat(parts, dim=1))


def _log_probabilities(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    moved = {name: tensor.to(model.device, model.dtype) for name, tensor in inputs.items()}
    return model(**moved).logits.cpu().double().log_softmax(-1)  # type: ignore[no-any-return]


def held_out(
    folder: Path, baseline: Path | None, sources: list[str], samples: int | None
) -> tuple[Iterable[tuple[dict[str, Tensor], Tensor]], tuple[int, ...]]:
    """The images of `sources` as `compare_images` takes them, and the shape of one: `(channels, height, width)`.

    Raises:
        EffllmError: the classes of model and baseline differ; see `labelled_batches`.
    """
    if baseline is not None:
        own, other = (load_config(read_config(path)).id2label for path in (folder, baseline))
        if own != other:
            raise EffllmError(f"{baseline} and {folder} have different classes; name the model it was compressed from")
    batches = labelled_batches(folder, sources, samples, BATCH)
    first = next(batches)
    return chain([first], batches), tuple(first[0]["pixel_values"].shape[1:])
