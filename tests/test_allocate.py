"""The allocator against brute force, its bound, and its behaviour over budgets."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effllm.allocation.knapsack import Options, allocate
from effllm.errors import UsageError

option = st.tuples(st.integers(0, 40), st.floats(0, 10, allow_nan=False))
item = st.lists(option, min_size=1, max_size=5).map(lambda found: Options(*zip(*found, strict=True)))
problems = st.lists(item, min_size=1, max_size=5)


def least(items: list[Options]) -> int:
    return sum(min(each.nbytes) for each in items)


@given(problems, st.integers(0, 60))
@settings(max_examples=300, deadline=None)
def test_it_is_the_best_of_all_allocations(items, extra):
    budget = least(items) + extra
    feasible = [
        sum(each.losses[o] for each, o in zip(items, choice, strict=True))
        for choice in itertools.product(*(range(len(each.nbytes)) for each in items))
        if sum(each.nbytes[o] for each, o in zip(items, choice, strict=True)) <= budget
    ]
    found = allocate(items, budget)
    assert found.loss == pytest.approx(min(feasible), abs=1e-9)
    assert found.nbytes <= budget and found.gap == 0
    assert found.nbytes == sum(each.nbytes[o] for each, o in zip(items, found.choice, strict=True))


def large(seed: int, items: int = 224, options: int = 12) -> list[Options]:
    """A menu of the size of a 7B model's: losses that fall fourfold a bit, with scatter."""
    random = np.random.default_rng(seed)
    sizes = random.choice([4096 * 4096, 4096 * 11008], items)
    bits = np.sort(random.uniform(2, 8.5, (items, options)), axis=1)
    losses = random.lognormal(-4, 2, (items, 1)) * 4.0**-bits * random.lognormal(0, 0.2, (items, options))
    return [
        Options((size * b / 8).astype(int).tolist(), loss.tolist())
        for size, b, loss in zip(sizes, bits, losses, strict=True)
    ]


@pytest.mark.parametrize("seed", range(3))
def test_a_large_menu_is_within_a_thousandth_of_the_bound(seed):
    items = large(seed)
    for share in (0.1, 0.3, 0.6):
        low, high = least(items), sum(max(each.nbytes) for each in items)
        found = allocate(items, int(low + share * (high - low)))
        assert found.bound <= found.loss and found.gap < 1e-3


def test_a_larger_budget_never_loses_more():
    items = large(0, items=40)
    low, high = least(items), sum(max(each.nbytes) for each in items)
    losses = [allocate(items, int(budget)).loss for budget in np.linspace(low, 1.1 * high, 60)]
    assert losses == sorted(losses, reverse=True)


def test_a_budget_below_the_smallest_possible_says_what_that_is():
    with pytest.raises(UsageError, match="a budget of 5 bytes is below the smallest possible, 7"):
        allocate([Options([3, 9], [1, 0]), Options([4], [0])], 5)


def test_nothing_to_allocate_is_fine():
    assert allocate([], 10).choice == []
