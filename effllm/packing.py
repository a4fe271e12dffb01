"""n-bit integers to bytes and back, exactly.

A row of codes is one little-endian bit stream: code i holds the bits [i * bits, (i + 1) * bits) of the row, bit k of the
row being bit k % 8 of byte k // 8. Every row starts on a byte, so rows can be gathered without unpacking the others.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_width(count: int, bits: int) -> int:
    """Bytes that a row of `count` codes of `bits` bits takes."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs uint8 codes `[..., n]`, each below 2**bits, into uint8 `[..., ceil(n * bits / 8)]`. `bits` is 1 to 8."""
    if bits == 8:
        return codes.contiguous()
    period = math.lcm(8, bits)
    values, count = period // bits, codes.shape[-1]
    codes = F.pad(codes, (0, -count % values)).unflatten(-1, (-1, values))
    out = codes.new_zeros(*codes.shape[:-1], period // 8)
    for index in range(values):
        byte, shift = divmod(index * bits, 8)
        out[..., byte] |= codes[..., index] << shift
        if shift + bits > 8:
            out[..., byte + 1] |= codes[..., index] >> (8 - shift)
    return out.flatten(-2)[..., : packed_width(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 `[..., ceil(count * bits / 8)]` to uint8 codes `[..., count]`."""
    if bits == 8:
        return packed
    period = math.lcm(8, bits)
    width, mask = period // 8, (1 << bits) - 1
    packed = F.pad(packed, (0, -packed.shape[-1] % width)).unflatten(-1, (-1, width))
    values = []
    for index in range(period // bits):
        byte, shift = divmod(index * bits, 8)
        value = packed[..., byte] >> shift
        if shift + bits > 8:
            value = value | (packed[..., byte + 1] << (8 - shift))
        values.append(value & mask)
    return torch.stack(values, dim=-1).flatten(-2)[..., :count]
