"""What a budget leaves for the sites of a model, in bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from effllm.budget import Budget
from effllm.errors import UsageError
from effllm.measure.memory import kv_cache, scratch
from effllm.method import Codec
from effllm.site import Site

HEADER = 110  # bytes of one tensor in a safetensors header beside its name, at most
SHARD = 256  # bytes of a shard's header beside its tensors, padding and guard included


@dataclass(frozen=True)
class Footprint:
    """What a model's weights take, and what a budget leaves for its sites."""

    sites: list[Site]
    """Those that count."""
    dense: int
    """Bytes of one weight that is left as it is."""
    rest: int
    """Bytes of the weight files beside those sites: other tensors, headers."""
    original: int
    """Bytes of the original's weight files."""

    def nbytes(self, site: Site, codec: Codec | None, budget: Budget) -> int:
        """What a site takes of the budget under a codec, or as it is; headers are counted where files are."""
        stored = site.size * self.dense if codec is None else codec.stored_bytes(site.shape)
        if budget.unit == "bpw":
            return stored
        tensors = 1 if codec is None else len(codec.layout(site.shape))
        return stored + tensors * (HEADER + len(site.name) + 16)

    def limit(self, budget: Budget) -> int:
        """Bytes that the sites may take together."""
        if budget.unit == "bpw":
            return int(budget.value * sum(site.size for site in self.sites) / 8)
        total = budget.value * (self.original if budget.unit == "x" else 1)
        return int(total) - self.rest


def weights_within(ram: int, sites: list[Site], config: PreTrainedConfig, context: int, dtype: torch.dtype) -> int:
    """Bytes of weights that leave room for the KV cache and the scratch of `context` tokens within `ram` bytes."""
    beside = sum(kv_cache(config, context, dtype)) + scratch(sites, config, context, dtype)
    if beside >= ram:
        raise UsageError(
            f"--ram {ram / 1e9:.2f}GB: the KV cache and scratch of {context} tokens take {beside / 1e9:.2f} GB; give "
            "more, or a shorter --context"
        )
    return ram - beside


def header_bytes(tensors: Mapping[str, object], shards: int) -> int:
    """An upper bound of what the headers of `shards` safetensors files with these tensors take."""
    return sum(len(name) + HEADER for name in tensors) + shards * SHARD
