"""What a scorer may use to rank visual tokens, the attention of the layer about to run above all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from effllm.errors import EffllmError

PROBE = "effllm_probe"
CACHE = ("cache", "past_key_values")  # what a KV cache is called since transformers 5.24, and before


def kv_cache(arguments: Any) -> Any:
    """The KV cache among the arguments or results of a module; None where there is none."""
    return next((arguments[name] for name in CACHE if arguments.get(name) is not None), None)


class _Probed(Exception):
    """Ends a layer's forward once its queries and keys are known."""

    def __init__(self, query: Tensor, key: Tensor, scaling: float, softcap: float | None):
        self.query, self.key, self.scaling, self.softcap = query, key, scaling, softcap


def _probe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    raise _Probed(query, key, kwargs.get("scaling") or query.shape[-1] ** -0.5, kwargs.get("softcap"))


AttentionInterface.register(PROBE, _probe)


@dataclass
class Ranking:
    """What a scorer may use at a drop: all `[batch, tokens, ...]` of the tokens that are left before it."""

    layer: Any
    hidden: Tensor
    previous: Tensor
    """Hidden states one layer earlier."""
    visual: Tensor
    queries: Tensor
    """Which tokens the ranking asks: the last of the prompt, or those before each answer of a training text."""
    allowed: Tensor
    """`[batch, tokens]`: tokens that are neither padding nor fillers."""
    cached: Tensor
    """`[batch, keys]`: which keys of the layer's KV cache, all from earlier turns, are neither."""
    kwargs: dict[str, Any]

    def attention(self) -> Tensor:
        """Attention from the queries to every token `[batch, tokens]` in fp32, mean over heads and queries.

        Queries and keys are those that this layer itself is about to compute (its norm, projections, rotary embedding).
        """
        rows = left_filled(self.queries)
        if not rows.shape[1]:  # nothing asks
            return torch.zeros(self.visual.shape, device=rows.device)
        query, probed = self._probe(rows.clamp_min(0))
        key, seen = probed.key, self._sees(rows)
        if self.cached.shape[1]:
            key = torch.cat([kv_cache(self.kwargs).layers[self.layer.self_attn.layer_idx].keys, key], dim=2)
            seen = torch.cat([self.cached.unsqueeze(1).expand(-1, rows.shape[1], -1), seen], dim=2)
        query = query.float().unflatten(1, (-1, query.shape[1] // key.shape[1]))
        scores = query @ key.float().unsqueeze(2).transpose(-1, -2) * probed.scaling
        if probed.softcap is not None:
            scores = torch.tanh(scores / probed.softcap) * probed.softcap
        weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)[..., -self.hidden.shape[1] :]
        weights = weights.flatten(1, 2).mean(1).masked_fill((rows < 0).unsqueeze(-1), 0)
        return torch.div(weights.sum(1), (rows >= 0).sum(1, keepdim=True).clamp_min(1))

    def _sees(self, rows: Tensor) -> Tensor:
        """`[batch, queries, tokens]`: what the layer's mask lets each query see."""
        count = self.hidden.shape[1]
        mask = self.kwargs["attention_mask"]
        if mask is not None and mask.dim() == 4:
            seen = take(mask[:, 0, :, -count:], rows)
            seen = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
        else:
            seen = torch.arange(count, device=rows.device) <= rows.unsqueeze(-1)
        seen = seen & self.allowed.unsqueeze(1)
        return seen | ~seen.any(-1, keepdim=True)

    def _probe(self, rows: Tensor) -> tuple[Tensor, _Probed]:
        """The queries of `rows`, and what the layer hands to its attention for all tokens.

        Where the projections have the usual names, in two runs without what nobody reads: the keys of all tokens, then the
        queries of `rows` alone.
        """
        module, rotary = self.layer.self_attn, self.kwargs["position_embeddings"]
        if not ({"q_proj", "k_proj", "v_proj"} <= module._modules.keys() and hasattr(module, "head_dim")):
            probed = self._run(self.hidden, self.kwargs, ())
            index = rows[:, None, :, None].expand(-1, probed.query.shape[1], -1, probed.query.shape[-1])
            return probed.query.gather(2, index), probed
        tables = None if rotary is None else tuple(take(table, rows) for table in rotary)
        few = {**self.kwargs, "position_embeddings": tables, "position_ids": None}
        asked = self._run(take(self.hidden, rows), few, ("k_proj", "v_proj"))
        return asked.query, self._run(self.hidden, self.kwargs, ("q_proj", "v_proj"))

    def _run(self, hidden: Tensor, kwargs: dict[str, Any], unread: tuple[str, ...]) -> _Probed:
        """Runs a twin of the layer, which shares its weights but for the `unread`, until its attention is called."""
        twin, attention = _twin(self.layer), _twin(self.layer.self_attn)
        twin._modules["self_attn"] = attention
        attention._modules |= {name: _Nothing(attention.head_dim) for name in unread}
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation_internal = PROBE
        try:
            type(self.layer).forward(
                twin, hidden, **{**kwargs, **dict.fromkeys(kwargs.keys() & set(CACHE)), "use_cache": False}
            )
        except _Probed as probed:
            return probed
        raise EffllmError(f"{type(self.layer).__name__} never called its attention, so its tokens cannot be ranked")


class _Nothing(nn.Module):
    """A projection to one head whose result nobody reads."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], self.width)


def _twin(module: Any) -> Any:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    twin.__dict__["training"] = False
    return twin


Scorer = Callable[[Ranking], Tensor]
"""Scores `[batch, tokens]`; of the visual tokens those with the largest stay."""


def left_filled(keep: Tensor) -> Tensor:
    """Indices of the true entries of each row, ascending, filled on the left with -1 to the longest row."""
    index = torch.where(keep, torch.arange(keep.shape[1], device=keep.device), -1).sort(dim=1).values
    return index[:, keep.shape[1] - int(keep.sum(1).max()) :]


def take(x: Tensor, index: Tensor) -> Tensor:
    """`x` `[batch or 1, tokens, ...]` at `index` `[batch, n]`."""
    index = index.to(x.device)
    rows = torch.arange(len(index), device=x.device).unsqueeze(1)
    return x.expand(len(index), *x.shape[1:])[rows, index.clamp_min(0)]
