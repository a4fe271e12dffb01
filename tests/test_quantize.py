"""Uniform quantization: what it stores, and that the search never loses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effllm.methods.quantize import Quantize


def weights(rows: int = 24, columns: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, 64, 128, "row"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_error_is_below_a_step(bits, group_size, symmetric):
    """Min-max: half a step by rounding, and at the ends of the range half a step more by rounding the zero point."""
    codec = Quantize(bits=bits, group_size=group_size, symmetric=symmetric, range="minmax")
    weight = weights()
    data = codec.encode(weight)
    size = 256 if group_size == "row" else group_size
    step = data["scale"].float().abs().repeat_interleave(size, dim=1)
    error = (codec.decode(data, weight.shape) - weight).abs()
    assert bool((error <= step * 1.13).all()), "0.13: what rounding the scale to fp16 moves the ends of 255 steps"


@given(st.integers(2, 8), st.integers(1, 200), st.sampled_from([8, 32, 64, "row"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_row_length_round_trips_and_is_counted(bits, columns, group, symmetric):
    codec = Quantize(bits=bits, group_size=group, symmetric=symmetric)
    weight = weights(5, columns)
    data = codec.encode(weight)
    size = columns if group == "row" else min(group, columns)
    groups = -(-columns // size)
    row = -(-columns * bits // 8) + 2 * groups + (0 if symmetric else -(-groups * bits // 8))
    assert codec.stored_bytes((5, columns)) == 5 * row == sum(tensor.nbytes for tensor in data.values())
    assert codec.decode(data, (5, columns)).shape == (5, columns)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_search_is_never_worse_than_minmax(bits):
    weight = weights()
    errors = {}
    for mode in ("minmax", "search"):
        codec = Quantize(bits=bits, range=mode)
        errors[mode] = (codec.decode(codec.encode(weight), weight.shape) - weight).square().view(24, -1, 64).sum(-1)
    assert bool((errors["search"] <= errors["minmax"] + 1e-9).all())
    assert errors["search"].sum() < errors["minmax"].sum()


def test_bits_per_weight_formula():
    assert 8 * Quantize(bits=4, group_size=64).stored_bytes((128, 4096)) / (128 * 4096) == 4 + (16 + 4) / 64
    assert 8 * Quantize(bits=3, group_size=128, symmetric=True).stored_bytes((128, 4096)) / (128 * 4096) == 3 + 16 / 128


def test_equal_bytes_whatever_the_chunking(monkeypatch):
    import effllm.methods.quantize as module

    weight = weights(64, 256)
    whole = Quantize(bits=3).encode(weight)
    monkeypatch.setattr(module, "ENCODE_CHUNK", 1000)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in Quantize(bits=3).encode(weight).items())


def test_zeros_constants_and_extremes_stay_finite():
    for value in (0.0, 1e-9, 3.0, -3.0, 1e6):
        weight = torch.full((2, 64), value)
        for symmetric in (False, True):
            codec = Quantize(bits=4, symmetric=symmetric)
            decoded = codec.decode(codec.encode(weight), weight.shape)
            assert bool(torch.isfinite(decoded).all())
            assert value != 0 or bool((decoded == 0).all())


def test_symmetric_represents_the_extreme_exactly():
    weight = torch.zeros(1, 64)
    weight[0, 5], weight[0, 9] = 2.0, -1.0
    codec = Quantize(bits=4, symmetric=True, range="minmax")
    assert codec.decode(codec.encode(weight), weight.shape)[0, 5] == 2.0
