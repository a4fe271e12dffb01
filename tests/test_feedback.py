"""Error feedback: better in the metric than rounding to nearest, whatever the metric is like."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effllm.methods._feedback import column_weights
from effllm.methods.quantize import Quantize
from effllm.moments import Metric, Moments


def correlated(columns: int, tokens: int = 400) -> Tensor:
    """Second moments of inputs that depend on each other, with a few strong ones."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x = x * (1 + 5 * (torch.arange(columns) % 17 == 0))
    return x.t() @ x / tokens


def moments(A: Tensor, rows: int) -> Moments:
    return Moments(Metric(A[None], len(A)), torch.full((rows,), 1 / rows))


def cost(codec: Quantize, weight: Tensor, found: Moments, with_feedback: bool) -> float:
    stored = codec.encode(weight, found if with_feedback else None)
    return float(found.costs(codec.decode(stored, tuple(weight.shape)) - weight).sum())


@given(
    st.integers(2, 8), st.sampled_from([16, 24, 32, 64, "row"]), st.booleans(), st.sampled_from(["minmax", "search"])
)
@settings(max_examples=40, deadline=None)
def test_it_costs_less_than_rounding_to_nearest(bits, group_size, symmetric, span):
    codec = Quantize(bits=bits, group_size=group_size, symmetric=symmetric, range=span)
    weight = torch.randn(24, 88, generator=torch.Generator().manual_seed(0))
    found = moments(correlated(88), 24)
    assert cost(codec, weight, found, True) < cost(codec, weight, found, False)


def assert_alike(one: Tensor, other: Tensor, weight: Tensor, found: Moments) -> None:
    """Products of other shapes round differently, which may tip a scale or a code, and with it what follows in its row."""
    assert (one == other).all(1).float().mean() > 0.7
    costs = [found.costs(decoded - weight).sum() for decoded in (one, other)]
    assert torch.allclose(*costs, rtol=0.1)


@pytest.mark.parametrize("group_size", [32, 48, "row"])
def test_rows_are_solved_on_their_own(group_size):
    weight = torch.randn(60, 96, generator=torch.Generator().manual_seed(0))
    codec, found = Quantize(bits=3, group_size=group_size), moments(correlated(96), 60)
    index = torch.arange(0, 60, 2)
    whole, part = codec.encode(weight, found), codec.encode(weight[index], found.of(index))
    decoded = codec.decode_rows(whole, index, (60, 96)), codec.decode(part, (30, 96))
    assert_alike(*decoded, weight[index], found.of(index))


@given(
    st.integers(2, 8), st.sampled_from([16, 48, "row"]), st.booleans(), st.integers(8, 100), st.integers(1, 4),
    st.sampled_from([1e-6, 1.0, 1e6]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_refining_never_costs_more(bits, group_size, symmetric, columns, rank, size):
    codec = Quantize(bits=bits, group_size=group_size, symmetric=symmetric)
    weight = torch.randn(9, columns, generator=torch.Generator().manual_seed(columns))
    A = size * correlated(columns, tokens=40 * rank)
    found = Moments(Metric(A[None], columns), torch.ones(9))
    metric = found.solving
    place = metric.order.argsort()
    damped = Moments(Metric(metric.damped()[place][:, place][None], columns), torch.ones(9))
    data = codec.encode(weight, found)
    better = codec.refine(data, weight, found)
    layouts = [{name: (tuple(t.shape), t.dtype) for name, t in one.items()} for one in (data, better)]
    assert layouts[0] == layouts[1]
    costs = [damped.costs(codec.decode(one, tuple(weight.shape)) - weight) for one in (data, better)]
    assert (costs[1] <= costs[0] * 1.001 + 1e-6 * float(costs[0].max())).all()


def test_refining_gains_most_at_two_bits():
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    found, gains = moments(correlated(96), 40), []
    for bits in (2, 4):
        codec = Quantize(bits=bits, group_size=32)
        data = codec.encode(weight, found)
        stored = (data, codec.refine(data, weight, found))
        before, after = (float(found.costs(codec.decode(one, (40, 96)) - weight).sum()) for one in stored)
        gains.append(1 - after / before)
    assert gains[0] > gains[1] > 0.02, gains


def test_several_options_together_are_what_each_is_alone():
    codecs = [
        Quantize(bits=b, group_size=g, symmetric=s) for b in (2, 5) for g in (32, 48, "row") for s in (True, False)
    ]
    weight = torch.randn(40, 96, generator=torch.Generator().manual_seed(0))
    found = moments(correlated(96), 40)
    for codec, stored in zip(codecs, Quantize.encode_each(codecs, weight, found), strict=True):
        decoded = (codec.decode(data, (40, 96)) for data in (stored, codec.encode(weight, found)))
        assert_alike(*decoded, weight, found)


@pytest.mark.parametrize(
    "A",
    [
        torch.zeros(64, 64),
        torch.ones(64, 64),
        torch.diag((torch.arange(64) < 5).float()),
        1e-30 * correlated(64),
        1e20 * correlated(64),
        correlated(64, tokens=3),
        torch.diag(torch.logspace(-20, 10, 64)),
    ],
    ids=["zero", "rank one", "five columns", "tiny", "huge", "few tokens", "steep"],
)
@pytest.mark.parametrize("weight", ["normal", "zero", "one column", "large"])
def test_no_metric_and_no_weight_breaks_it(A, weight):
    matrix = {"normal": torch.randn(8, 64), "zero": torch.zeros(8, 64), "large": 1e5 * torch.randn(8, 64)}.get(weight)
    if matrix is None:
        matrix = torch.zeros(8, 64)
        matrix[:, 5] = 1.0
    codec, found = Quantize(bits=4, group_size=32), moments(A, 8)
    data = codec.encode(matrix, found)
    for stored, most in ((data, 1.0), (codec.refine(data, matrix, found), 1.5)):
        decoded = codec.decode(stored, (8, 64))
        assert torch.isfinite(decoded).all()
        assert (decoded - matrix).abs().max() <= most * matrix.abs().max()


def test_a_diagonal_metric_is_rounding_to_nearest():
    codec, weight = Quantize(bits=4, group_size=32, range="minmax"), torch.randn(8, 64)
    plain = codec.encode(weight)
    solved = codec.encode(weight, Moments(Metric(torch.rand(64, 1, 1), 64), torch.ones(8)))
    assert all(torch.equal(plain[name], solved[name]) for name in plain)


def test_the_factor_inverts_and_weights_columns_by_what_is_left_of_them():
    metric = Metric((correlated(40) + 0.1 * torch.eye(40))[None], 40)
    damped, factor = metric.damped(), metric.factor
    assert (damped.diagonal().diff() <= 0).all()
    assert torch.allclose(factor.t() @ factor @ damped, torch.eye(40), atol=1e-2)
    assert torch.equal(factor, factor.triu())
    assert (column_weights(metric)[metric.order] <= damped.diagonal() * 1.01).all()
    metric.release()
    assert torch.equal(metric.factor, factor)
