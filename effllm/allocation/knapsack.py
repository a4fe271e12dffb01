"""The allocator: one option for every item, least total loss within a budget of bytes, with a certified gap.

A multiple-choice knapsack. Losses add up, which is the assumption of rate-distortion pruning (arXiv 2308.10438, whose
dynamic programme this is); the table is a Pareto front of (bytes, loss) instead of one column a byte, thinned where it grows
long, and then no longer exact. The relaxed problem, in which an item may have a mixture of two options, is solved exactly:
it bounds the loss from below, and its steps, each improved by the best change of one item or two, are a second solution. The
better one is kept. Both are the best of a set that only grows with the budget, so a larger budget never gives a larger loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from effllm.errors import UsageError

LONGEST_FRONT = 4096  # points of a Pareto front; beyond, the best of each of so many equal ranges of bytes stay
Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Options:
    """What may be chosen for one item: a site, or sites that must agree."""

    nbytes: Sequence[int]
    losses: Sequence[float]


@dataclass(frozen=True)
class Allocation:
    """One option an item."""

    choice: list[int]
    nbytes: int
    loss: float
    bound: float
    """No allocation within the budget has a smaller loss than this."""

    @property
    def gap(self) -> float:
        """How far the loss is above the bound at most, as a share of the loss."""
        return 0.0 if self.loss <= self.bound else (self.loss - self.bound) / self.loss


@dataclass(frozen=True)
class _Front:
    """Allocations of the first items, none of them worse in both bytes and loss than another; and where each came from."""

    nbytes: Integers
    losses: Floats
    parent: Integers
    option: Integers
    exact: bool


def allocate(items: Sequence[Options], budget: int) -> Allocation:
    """The allocation of least loss whose bytes do not exceed `budget`.

    Raises:
        UsageError: the cheapest options alone exceed the budget.
    """
    least = sum(min(item.nbytes) for item in items)
    if least > budget:
        raise UsageError(f"a budget of {budget:,} bytes is below the smallest possible, {least:,}")
    if not items:
        return Allocation([], 0, 0.0, 0.0)
    fronts = _fronts(items)
    index = int(np.searchsorted(fronts[-1].nbytes, budget, side="right")) - 1
    table = _trace(fronts, index)
    steps, bound = _relaxed(items, budget)
    choice = min(table, _improved(items, steps, budget), key=lambda found: _loss(items, found))
    loss = _loss(items, choice)
    nbytes = sum(int(item.nbytes[option]) for item, option in zip(items, choice, strict=True))
    return Allocation(choice, nbytes, loss, loss if fronts[-1].exact else min(bound, loss))


def _loss(items: Sequence[Options], choice: Sequence[int]) -> float:
    return float(sum(item.losses[option] for item, option in zip(items, choice, strict=True)))


def _fronts(items: Sequence[Options]) -> list[_Front]:
    """The Pareto front after each item."""
    zero = np.zeros(1, dtype=np.int64)
    front = _Front(zero, np.zeros(1), zero, zero, True)
    fronts = []
    for item in items:
        sizes, losses = np.asarray(item.nbytes, dtype=np.int64), np.asarray(item.losses, dtype=np.float64)
        nbytes = (front.nbytes[:, None] + sizes).ravel()
        total = (front.losses[:, None] + losses).ravel()
        kept = _pareto(nbytes, total)
        thinned = _thin(nbytes[kept], total[kept])
        exact = front.exact and len(thinned) == len(kept)
        kept = kept[thinned]
        front = _Front(nbytes[kept], total[kept], kept // len(sizes), kept % len(sizes), exact)
        fronts.append(front)
    return fronts


def _pareto(nbytes: Integers, losses: Floats) -> Integers:
    """Indices of the points that no other beats, by ascending bytes."""
    order = np.lexsort((losses, nbytes))
    best = np.minimum.accumulate(losses[order])
    kept: Integers = order[np.concatenate([[True], best[1:] < best[:-1]])]
    return kept


def _thin(nbytes: Integers, losses: Floats) -> Integers:
    """Of a front that is too long, the smallest point and the one of least loss in each of equal ranges of bytes."""
    if len(nbytes) <= LONGEST_FRONT:
        return np.arange(len(nbytes))
    ranges = (nbytes - nbytes[0]) * (LONGEST_FRONT - 1) // (nbytes[-1] - nbytes[0])
    last = np.flatnonzero(np.append(ranges[1:] != ranges[:-1], True))  # of falling losses the last is the least
    return np.unique(np.append(last, 0))


def _trace(fronts: list[_Front], index: int) -> list[int]:
    choice = []
    for front in reversed(fronts):
        choice.append(int(front.option[index]))
        index = int(front.parent[index])
    return choice[::-1]


def _relaxed(items: Sequence[Options], budget: int) -> tuple[list[list[int]], float]:
    """Allocations within the budget, from the smallest one on along the items' convex hulls, best saving a byte first; and
    the loss of the relaxed problem, which takes the last step in part."""
    steps, choice = [], []
    for number, item in enumerate(items):
        nbytes, losses = np.asarray(item.nbytes, dtype=np.int64), np.asarray(item.losses, dtype=np.float64)
        hull: list[int] = []
        for point in _pareto(nbytes, losses):
            while len(hull) > 1 and _rate(nbytes, losses, hull[-2], hull[-1]) <= _rate(nbytes, losses, hull[-1], point):
                hull.pop()
            hull.append(int(point))
        choice.append(hull[0])
        steps += [(_rate(nbytes, losses, *pair), number, pair[1]) for pair in itertools.pairwise(hull)]
    left = budget - sum(int(item.nbytes[option]) for item, option in zip(items, choice, strict=True))
    found = [list(choice)]
    for rate, number, option in sorted(steps, key=lambda step: -step[0]):
        more = int(items[number].nbytes[option]) - int(items[number].nbytes[choice[number]])
        if more > left:
            return found, _loss(items, choice) - rate * left
        left -= more
        choice[number] = option
        found.append(list(choice))
    return found, _loss(items, choice)


def _rate(nbytes: Integers, losses: Floats, one: int, other: int) -> float:
    return float((losses[one] - losses[other]) / (nbytes[other] - nbytes[one]))


def _improved(items: Sequence[Options], found: list[list[int]], budget: int) -> list[int]:
    """The best allocation that differs from one of `found` in one item, or in an even and an odd one."""
    owner = np.repeat(np.arange(len(items)), [len(item.nbytes) for item in items])
    option = np.concatenate([np.arange(len(item.nbytes)) for item in items])
    nbytes = np.concatenate([np.asarray(item.nbytes, dtype=np.int64) for item in items])
    losses = np.concatenate([np.asarray(item.losses, dtype=np.float64) for item in items])
    first = np.searchsorted(owner, np.arange(len(items)))
    even = owner % 2 == 0
    best, least = found[-1], _loss(items, found[-1])
    for choice in reversed(found):
        now = first + choice
        more, change = nbytes - nbytes[now][owner], losses - losses[now][owner]
        slack, loss = budget - int(nbytes[now].sum()), float(losses[now].sum())
        if loss + 2 * float(change.min()) >= least:
            continue
        one, other = (_by_bytes(more, change, np.flatnonzero(half)) for half in (even, ~even))
        partner = np.searchsorted(more[other[0]], slack - more[one[0]], side="right") - 1
        fits = partner >= 0
        if not fits.any():
            continue
        total = np.where(fits, change[one[0]] + change[other[1][partner]], np.inf)
        index = int(total.argmin())
        if loss + total[index] < least:
            best, least = list(choice), loss + float(total[index])
            for changed in (one[0][index], other[1][partner[index]]):
                best[owner[changed]] = int(option[changed])
    return best


def _by_bytes(more: Integers, change: Floats, members: Integers) -> tuple[Integers, Integers]:
    """`members` by ascending bytes, and for each place the one up to there that changes the loss most for the better."""
    order = members[np.argsort(more[members], kind="stable")]
    lowest = np.minimum.accumulate(change[order])
    places = np.maximum.accumulate(np.where(change[order] == lowest, np.arange(len(order)), 0))
    return order, order[places]
