"""Packing is exact for every width and length."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effllm.packing import pack, packed_width, unpack


@st.composite
def codes_and_bits(draw):
    bits = draw(st.integers(1, 8))
    rows, count = draw(st.integers(1, 4)), draw(st.integers(1, 70))
    values = draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * count, max_size=rows * count))
    return torch.tensor(values, dtype=torch.uint8).view(rows, count), bits


@given(codes_and_bits())
@settings(max_examples=200, deadline=None)
def test_round_trip_is_exact(case):
    codes, bits = case
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (codes.shape[0], packed_width(codes.shape[1], bits))
    assert torch.equal(unpack(packed, bits, codes.shape[1]), codes)


@given(codes_and_bits())
@settings(max_examples=100, deadline=None)
def test_layout_is_one_little_endian_bit_stream(case):
    codes, bits = case
    stream = np.unpackbits(pack(codes, bits).numpy(), axis=1, bitorder="little")[:, : codes.shape[1] * bits]
    weights = 1 << np.arange(bits)
    assert (stream.reshape(*codes.shape, bits) @ weights == codes.numpy()).all()


@given(codes_and_bits(), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_rows_unpack_on_their_own(case, row):
    codes, bits = case
    row %= len(codes)
    assert torch.equal(unpack(pack(codes, bits)[row], bits, codes.shape[1]), codes[row])


def test_meta_tensors_keep_their_shapes():
    for bits in range(1, 9):
        packed = pack(torch.empty(3, 21, dtype=torch.uint8, device="meta"), bits)
        assert packed.shape == (3, packed_width(21, bits)) and packed.is_meta
