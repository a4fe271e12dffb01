"""Memory that a model needs to run, from its config and plan alone: weights, KV cache by layer, scratch.

A model that does not generate (an image classifier, say) has no KV cache; its scratch is that of one input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from effllm.site import Site

CACHED = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class Memory:
    """Bytes needed at one context length; `kv_by_layer` has one entry a layer, none where the model does not generate."""

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


def generates(config: PreTrainedConfig) -> bool:
    """Whether the model keeps keys and values from one token to the next."""
    return getattr(config.get_text_config(decoder=True), "use_cache", None) is not None


def hidden_shape(sites: list[Site], config: PreTrainedConfig, tokens: int) -> tuple[int, int]:
    """Positions and width of the hidden states of one input: `tokens` of text, frames of speech, or an image's first map.

    The first map has one position a patch, or a pixel at half the height and width where there are no patches; none where
    the config names no image size.
    """
    text: Any = config.get_text_config(decoder=True)
    vision = _vision(config)
    if vision is None or not sites:
        return getattr(config, "max_source_positions", None) or tokens, getattr(text, "hidden_size", None) or 0
    size, patch = (getattr(vision, name, None) or default for name, default in (("image_size", 0), ("patch_size", 2)))
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    rows, columns = patch if isinstance(patch, (tuple, list)) else (patch, patch)
    return height // rows * (width // columns), sites[0].shape[0]


def _vision(config: PreTrainedConfig) -> Any:
    """The config of an image model; None for any other, and for a model that writes about images."""
    vision = getattr(config, "vision_config", config)
    return vision if hasattr(vision, "num_channels") and not generates(config) else None


def kv_cache(config: PreTrainedConfig, context: int, dtype: torch.dtype) -> list[int]:
    """KV cache bytes of every layer for one sequence of `context` tokens, keys and values; [] without generation.

    Sliding layers keep at most their window. Layers without keys and values (recurrent ones) count 0: their state does not
    grow with the context. Layers that share another layer's cache count 0. The decoder of an encoder-decoder also keeps
    those of the encoder's output: all of a recording's frames, or `context` tokens.
    """
    if not generates(config):
        return []
    text: Any = config.get_text_config(decoder=True)
    layers = text.num_hidden_layers
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * layers
    shared = getattr(text, "num_kv_shared_layers", 0) or 0
    crossed = (getattr(config, "max_source_positions", None) or context) if config.is_encoder_decoder else 0
    sizes = []
    for index, kind in enumerate(kinds):
        tokens = min(context, window) if kind == "sliding_attention" and window else context
        cached = kind in CACHED and index < layers - shared
        sizes.append(2 * heads * width * (tokens + crossed) * dtype.itemsize if cached else 0)
    return sizes


def scratch(sites: list[Site], config: PreTrainedConfig, context: int, dtype: torch.dtype) -> int:
    """An estimate of what a forward needs beside weights and cache: one decoded matrix, and the activations.

    The largest matrix of a block is decoded in fp32 with one temporary of equal size and cast to `dtype`. Activations:
    the residual stream and its normed copy, queries, keys and values, attention output, and three times the widest inner
    layer, for a prefill of `context` tokens; one row of logits in fp32. Of an image, the same at its first map, the largest,
    with an inner layer of four times its width; none where the config names no image size.
    """
    text: Any = config.get_text_config(decoder=True)
    matrix = max((site.size for site in sites if site.role != "embedding"), default=0)
    inner = max((max(site.shape) for site in sites if site.role == "block"), default=0)
    count, width = hidden_shape(sites, config, context)
    activations = count * (6 * width + 3 * (inner if _vision(config) is None else 4 * width)) * dtype.itemsize
    logits = getattr(text, "vocab_size", None) or text.num_labels
    return matrix * (8 + dtype.itemsize) + int(activations + 4 * logits)
