"""What codecs share whose rows encode and decode on their own: work on a slice of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 19  # weights per step: fp32 temporaries stay in the cache, and no matrix is ever dense as a whole


class DecodesRows(Protocol):
    """A codec whose `decode_rows` touches no other row."""

    def decode_rows(self, data: dict[str, Tensor], index: Tensor | slice, shape: tuple[int, int]) -> Tensor: ...


def encode_by_rows(encode: Callable[[Tensor], dict[str, Tensor]], weight: Tensor, chunk: int) -> dict[str, Tensor]:
    """`encode` of slices of `weight` of some `chunk` weights each, joined; on the meta device of the whole."""
    step = len(weight) if weight.is_meta else max(1, chunk // weight.shape[1])
    parts = [encode(rows) for rows in weight.split(step)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def linear_by_rows(codec: DecodesRows, x: Tensor, data: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """`x @ W.T` in x's dtype, slice by slice of W's rows."""
    step = max(1, CHUNK // shape[1])
    slices = [slice(start, start + step) for start in range(0, shape[0], step)]
    return torch.cat([F.linear(x, codec.decode_rows(data, s, shape).to(x.dtype)) for s in slices], dim=-1)
