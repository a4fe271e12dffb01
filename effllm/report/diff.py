"""Two plans for one model, site by site, where they differ."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from effllm.allocation.spending import cache, price_key
from effllm.checkpoint import Checkpoint, resolve
from effllm.edits import applied
from effllm.errors import UsageError
from effllm.method import Codec
from effllm.plans import Plan, load_plan
from effllm.price.collect import Prices, cached_prices
from effllm.report.dry_run import plan as describe
from effllm.site import Site, find_sites
from effllm.source import StoredModel


@dataclass(frozen=True)
class Side:
    """What one plan gives a site."""

    label: str
    bits: float
    nbytes: int
    loss: float | None
    """Expected KL, nats per token; None where it is not known without work."""


@dataclass(frozen=True)
class Difference:
    """A site to which two plans give different things."""

    site: str
    one: Side
    other: Side


def diff(one: str | Path | Plan, other: str | Path | Plan, model: str | Path, revision: str | None = None,
         device: str = "cpu", seed: int = 0) -> list[Difference]:  # fmt: skip
    """The sites of `model` to which the plans give different codecs, in model order.

    A plan with a budget is solved first. Losses are those of prices in the cache, where `effllm plan` or `compress` with the
    same calibration data, device and seed has put them; of a plan that rounds to nearest there are none. How the codecs are
    solved (`effort`, `inputs`, calibration) is not compared: see `settings_that_differ`.

    Raises:
        UsageError, EffllmError: see `load_plan` and `effllm.plan`; a plan that orders blocks, which only compressing does.
    """
    checkpoint = Checkpoint.open(resolve(model, revision))
    source = StoredModel(checkpoint)
    plans = [_concrete(plan, model, revision, device, seed) for plan in (one, other)]
    with applied(source.model, plans[0].structure()):
        sites = find_sites(source.model)
    assigned = [plan.assign(sites, {}) for plan in plans]
    prices = [_prices(plan, checkpoint, device, seed) for plan in plans]
    dense = source.dtype.itemsize
    found = []
    for site in sites:
        codecs = [codecs.get(site.name) for codecs in assigned]
        if codecs[0] != codecs[1]:
            sides = [_side(site, codec, price, dense) for codec, price in zip(codecs, prices, strict=True)]
            found.append(Difference(site.name, *sides))
    return found


def settings_that_differ(one: str | Path | Plan, other: str | Path | Plan) -> list[str]:
    """What two plans do differently to the same codecs, such as `effort: fast -> normal`."""
    sides = [
        load_plan(plan).model_dump(mode="json", include={"effort", "inputs", "calibration"}) for plan in (one, other)
    ]
    return [f"{key}: {value} -> {sides[1][key]}" for key, value in sides[0].items() if value != sides[1][key]]


def _concrete(plan: str | Path | Plan, model: str | Path, revision: str | None, device: str, seed: int) -> Plan:
    wanted = load_plan(plan)
    if wanted.scores():
        raise UsageError(
            f"plan {wanted.name} orders blocks, which only compressing does: there is nothing to compare before"
        )
    return describe(model, wanted, revision=revision, device=device, seed=seed).plan if wanted.limited else wanted


def _prices(plan: Plan, checkpoint: Checkpoint, device: str, seed: int) -> Prices | None:
    if not plan.solves:
        return None
    key = price_key(plan, checkpoint, torch.device(device), seed)
    return cached_prices(cache(key), key)


def _side(site: Site, codec: Codec | None, prices: Prices | None, dense: int) -> Side:
    if codec is None:
        return Side("unchanged", 8.0 * dense, site.size * dense, 0.0)
    nbytes = codec.stored_bytes(site.shape)
    known = prices is not None and codec.label() in prices.losses.get(site.name, {})
    loss = prices.corrected(site, codec) if prices is not None and known else None
    return Side(codec.label(), 8 * nbytes / site.size, nbytes, loss)


def show(found: list[Difference], names: tuple[str, str], settings: list[str]) -> None:
    """The differences as a table, and their sums; before them the `settings_that_differ`."""
    console = Console()
    for line in settings:
        console.print(line, highlight=False)
    if not found:
        console.print(f"{names[0]} and {names[1]} give every layer the same")
        return
    table = Table("layer", *names, "bits", "MB", "expected KL", title_justify="left")
    for row in found:
        sides = (row.one, row.other)
        losses = " -> ".join("?" if side.loss is None else f"{side.loss:.5f}" for side in sides)
        bits = " -> ".join(f"{side.bits:.2f}" for side in sides)
        size = " -> ".join(f"{side.nbytes / 1e6:.3f}" for side in sides)
        table.add_row(row.site, row.one.label, row.other.label, bits, size, losses)
    console.print(table)
    change = sum(row.other.nbytes - row.one.nbytes for row in found)
    known = [(row.one.loss, row.other.loss) for row in found]
    line = f"{len(found)} layers differ: {change:+,} bytes"
    if all(one is not None and other is not None for one, other in known):
        line += f", {sum((other or 0) - (one or 0) for one, other in known):+.5f} nats a token expected"
    console.print(line)
