"""What lies behind the base model: logits of hidden states, a few tokens at a time, and which positions count."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from effllm.errors import UsageError
from effllm.site import Site
from effllm.source import Batch, Source, run_batch

LOGITS = 1 << 25  # in memory at once, beside a few tensors of their size


def sites_behind(source: Source) -> list[Site]:
    """The sites that a language model uses behind its base model; none where it is to run as a whole."""
    model = source.model
    if not isinstance(model, PreTrainedModel) or source.base is model or model.get_output_embeddings() is None:
        return []
    inside = set(source.base.modules())
    outside = [site for site in source.sites if site.block is None]
    return [s for s in outside if any(model.get_submodule(name) not in inside for name in (s.name, *s.tied))]


def counted(batch: Batch, shape: torch.Size) -> Tensor:
    """Which positions `[positions]` are no padding."""
    mask = batch.get("decoder_attention_mask", batch.get("attention_mask"))
    if mask is None or mask.shape != shape:
        return torch.ones(shape, dtype=torch.bool).flatten()
    return mask.bool().flatten()


def positions(hidden: Tensor) -> Tensor:
    """`[positions, channels]` of a block's output: hidden states `[..., channels]` or maps `[images, channels, h, w]`."""
    return (hidden.movedim(1, -1) if hidden.dim() == 4 else hidden).flatten(0, -2)


def logits_of(result: Any) -> Tensor:
    logits = result if isinstance(result, Tensor) else getattr(result, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() not in (2, 3):
        raise UsageError(
            "the model returns no logits over tokens or classes, so a loss cannot be priced in KL: use a plan without a "
            "budget, or --fast, which prices without data"
        )
    return logits


def logits_at_once(model: nn.Module) -> int:
    """How many tokens' logits may be in memory together."""
    vocabulary: int = cast(Any, model).get_output_embeddings().weight.shape[0]
    return max(1, LOGITS // vocabulary)


def head_logits(source: Source, batch: Batch, kind: type[Any], states: Tensor) -> Tensor:
    """Logits of `states` `[1, tokens, width]` by what lies behind the base model, which returns a `kind`; batch is its."""
    with _returning(source.model, kind(last_hidden_state=states)):
        return logits_of(run_batch(source.model, batch, source.device))


@contextlib.contextmanager
def _returning(model: nn.Module, result: Any) -> Iterator[None]:
    """Lets the base model inside `model` (or its decoder, where `model` calls that) return `result` without computing."""
    assert isinstance(model, PreTrainedModel)
    called = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        called.append(True)
        return result

    inner = list(dict.fromkeys([model.base_model, model.get_decoder()]))
    for module in inner:
        module.forward = forward
    try:
        yield
    finally:
        for module in inner:
            del module.forward
    if not called:
        raise UsageError(
            f"{type(model).__name__} does not call its base model, so its head cannot be run alone: use --fast"
        )
