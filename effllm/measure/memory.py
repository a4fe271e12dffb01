"""Memory that a model needs to run, from its config and plan alone: weights, KV cache by layer, scratch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from effllm.site import Site

CACHED = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class Memory:
    """Bytes needed at one context length; `kv_by_layer` has one entry a layer."""

    weights: int
    kv_by_layer: list[int]
    scratch: int

    @property
    def kv(self) -> int:
        """KV cache of all layers."""
        return sum(self.kv_by_layer)

    @property
    def total(self) -> int:
        """Weights, KV cache and scratch; the runtime's own overhead is apart."""
        return self.weights + self.kv + self.scratch


def kv_cache(config: PreTrainedConfig, context: int, dtype: torch.dtype) -> list[int]:
    """KV cache bytes of every layer for one sequence of `context` tokens, keys and values.

    Sliding layers keep at most their window. Layers without keys and values (recurrent ones) count 0: their state does not
    grow with the context. Layers that share another layer's cache count 0.
    """
    text: Any = config.get_text_config()
    layers = text.num_hidden_layers
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * layers
    shared = getattr(text, "num_kv_shared_layers", 0) or 0
    sizes = []
    for index, kind in enumerate(kinds):
        tokens = min(context, window) if kind == "sliding_attention" and window else context
        cached = kind in CACHED and index < layers - shared
        sizes.append(2 * heads * width * tokens * dtype.itemsize if cached else 0)
    return sizes


def scratch(sites: list[Site], config: PreTrainedConfig, context: int, dtype: torch.dtype) -> int:
    """An estimate of what a forward needs beside weights and cache: one decoded matrix, and a prefill's activations.

    The largest matrix of a block is decoded in fp32 with one temporary of equal size and cast to `dtype`. Activations:
    the residual stream and its normed copy, queries, keys and values, attention output, and three times the widest inner
    layer, for `context` tokens; one row of logits in fp32.
    """
    text: Any = config.get_text_config()
    matrix = max((site.size for site in sites if site.role != "embedding"), default=0)
    inner = max((max(site.shape) for site in sites if site.role == "block"), default=0)
    activations = context * (6 * text.hidden_size + 3 * inner) * dtype.itemsize
    return matrix * (8 + dtype.itemsize) + int(activations + 4 * text.vocab_size)
