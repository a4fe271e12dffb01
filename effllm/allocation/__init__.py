"""A budget spent across the sites of a model: one option each, least expected loss."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from effllm.allocation.footprint import Footprint
from effllm.allocation.knapsack import Options, allocate
from effllm.budget import Budget
from effllm.errors import UsageError
from effllm.method import Codec
from effllm.site import Site

Choices = Mapping[str, Sequence[Codec | None]]
"""Site -> what it may get; None leaves it as it is."""


@dataclass(frozen=True)
class Solution:
    """What a budget buys."""

    assigned: dict[str, Codec]
    """Sites that are not here stay as they are."""
    loss: float
    """Expected, of all sites together."""
    bound: float
    """No choice within the budget has a smaller expected loss."""
    gap: float
    nbytes: int
    """Of the budget that is spent, and how much there was."""
    limit: int


def solve(
    budget: Budget, footprint: Footprint, choices: Choices, losses: Mapping[str, Sequence[float]],
    groups: Sequence[Sequence[str]] = (),
) -> Solution:  # fmt: skip
    """The choice of least loss within `budget`.

    `losses` has one figure for each of a site's `choices`. `groups` are lists of globs: sites of one block that match globs
    of one list get the same codec.

    Raises:
        UsageError: the smallest choices exceed the budget; a group's members share no codec.
    """
    members = _members(footprint.sites, groups)
    shared = [_shared(sites, choices) for sites in members]
    items = []
    for sites, codecs in zip(members, shared, strict=True):
        nbytes = [sum(footprint.nbytes(site, codec, budget) for site in sites) for codec in codecs]
        priced = [sum(losses[s.name][list(choices[s.name]).index(codec)] for s in sites) for codec in codecs]
        items.append(Options(nbytes, priced))
    limit = footprint.limit(budget)
    least = sum(min(item.nbytes) for item in items)
    if least > limit:
        raise UsageError(_too_small(budget, footprint, least, limit, choices))
    found = allocate(items, limit)
    picked = [(sites, codecs[option]) for sites, codecs, option in zip(members, shared, found.choice, strict=True)]
    assigned = {site.name: codec for sites, codec in picked if codec is not None for site in sites}
    ordered = {site.name: assigned[site.name] for site in footprint.sites if site.name in assigned}
    return Solution(ordered, found.loss, found.bound, found.gap, found.nbytes, limit)


def _members(sites: Sequence[Site], groups: Sequence[Sequence[str]]) -> list[list[Site]]:
    """The sites that must agree: those of one block and one group; each other site alone."""
    found: dict[object, list[Site]] = {}
    for site in sites:
        group = next(
            (n for n, globs in enumerate(groups) if any(fnmatch.fnmatchcase(site.name, g) for g in globs)), None
        )
        found.setdefault(site.name if group is None else (site.block, group), []).append(site)
    return list(found.values())


def _shared(sites: Sequence[Site], choices: Choices) -> list[Codec | None]:
    first, *others = (choices[site.name] for site in sites)
    codecs = [codec for codec in first if all(codec in other for other in others)]
    if not codecs:
        raise UsageError(
            f"{' and '.join(site.name for site in sites)} are a group, but the plan gives them no common codec"
        )
    return codecs


def _too_small(budget: Budget, footprint: Footprint, least: int, limit: int, choices: Choices) -> str:
    fixed = sorted((s for s in footprint.sites if len(choices[s.name]) == 1), key=lambda s: -s.size)
    kept = f"; the largest part that may not be chosen is {fixed[0].name}" if fixed else ""
    if budget.unit == "bpw":
        size = sum(site.size for site in footprint.sites)
        return f"a budget of {budget.value:g}bpw is below the smallest possible, {8 * least / size:.3f}bpw{kept}"
    total = (least + footprint.rest) / 1e6
    return (
        f"a budget of {(limit + footprint.rest) / 1e6:,.1f} MB is below the smallest possible, {total:,.1f} MB, of which "
        f"{footprint.rest / 1e6:,.1f} MB are no layer's weights{kept}"
    )
