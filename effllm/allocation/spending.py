"""What a plan is expected to cost before it is carried out: prices of its options, and what its budget buys."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from effllm.allocation import Solution, solve
from effllm.allocation.footprint import Footprint, header_bytes, weights_within
from effllm.budget import Budget
from effllm.checkpoint import Checkpoint
from effllm.data.caching import cache_folder
from effllm.data.inputs import data_key, folder_batches
from effllm.errors import UsageError
from effllm.method import Codec
from effllm.plans import Plan, Step
from effllm.price import relative_error
from effllm.price.collect import Options, Prices, collect_prices, kept_sums
from effllm.progress import track
from effllm.site import select, untied
from effllm.source import Batch, LiveModel, Source, StoredModel, in_dtype
from effllm.statistics.again import Seen, moments_again

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Priced:
    """A plan's options for one model, with what each is expected to cost."""

    plan: Plan
    source: Source
    batches: Sequence[Batch]
    options: Options
    prices: Prices | None
    """Nats per token; None without data."""

    @cached_property
    def losses(self) -> dict[str, list[float]]:
        """Site -> what each of its options costs; sites that the calibration data never reach are not there."""
        if self.prices is not None:
            return {
                site.name: [self.prices.corrected(site, codec) for codec in self.options[site.name]]
                for site in self.source.sites
                if site.name in self.prices.losses and site.name in self.options
            }
        found = {}
        for unit in track(list(self.source.units), "price"):
            members = [
                s for s in self.source.sites if s.name in self.options and s.parameter in self.source.units[unit]
            ]
            with self.source.resident(*([unit] if members else [])):
                for site in members:
                    weight = site.matrix(self.source.model)
                    found[site.name] = [relative_error(codec, weight) for codec in self.options[site.name]]
        return found

    def solution(self, model: nn.Module, original: int, extra: Mapping[str, int]) -> Solution:
        """What the plan's budget buys of `model`, the model in the dtype in which it is to be written.

        `original` are the bytes of its weight files, `extra` those of tensors that its class does not load, by name.

        Raises:
            UsageError: the budget is below the smallest possible.
        """
        sites = self.source.sites
        state = untied(model, sites)
        excluded = {site.name for site in select(self.plan.exclude, sites)}
        parameters = {site.parameter for site in sites}
        rest = {name: t.nbytes for name, t in state.items() if name not in parameters} | dict(extra)
        headers = header_bytes(rest, len(self.source.units) + 2)
        if self.plan.ram:
            if not isinstance(model, PreTrainedModel):
                raise UsageError(
                    "a budget of memory to run in needs a transformers model; give 'budget' instead of 'ram'"
                )
            ram = int(Budget.parse(self.plan.ram).value)
            budget = Budget(weights_within(ram, sites, model.config, self.plan.context, model.dtype), "bytes")
        else:
            budget = Budget.parse(str(self.plan.budget))
        counted = [site for site in sites if budget.unit != "bpw" or site.name not in excluded]
        dense = state[sites[0].parameter].itemsize
        footprint = Footprint(counted, dense, sum(rest.values()) + headers, original)
        fixed = {site.name for site in sites if len(self.options.get(site.name, ())) == 1}
        choices: dict[str, list[Codec | None]] = {}
        losses: dict[str, list[float]] = {}
        for site in counted:
            offered = self.options.get(site.name, ()) if site.name in self.losses or site.name in fixed else ()
            choices[site.name] = [*offered, *([] if site.name in fixed else [None])]
            losses[site.name] = [*self.losses.get(site.name, [0.0] * len(offered)), 0.0][: len(choices[site.name])]
        return solve(budget, footprint, choices, losses, self.plan.groups)

    def concrete(self, solution: Solution) -> Plan:
        """The plan that says for every site what it gets, and needs no prices: to be read, edited and replayed."""
        by_codec: dict[Codec, list[str]] = {}
        for name, codec in solution.assigned.items():
            by_codec.setdefault(codec, []).append(name)
        steps = [Step(sites=names, use=codec) for codec, names in by_codec.items()]
        steps += [step for step in self.plan.steps if step.apply is not None]
        return self.plan.model_copy(update={"budget": None, "ram": None, "groups": [], "steps": steps})

    def predicted(self, assigned: Mapping[str, Codec]) -> float | None:
        """Expected KL of these codecs together, nats per token, where the data reach; None without data."""
        if self.prices is None:
            return None
        found = [
            self.losses[name][self.options[name].index(codec)]
            for name, codec in assigned.items()
            if name in self.losses
        ]
        return sum(found)

    def again(
        self, assigned: Mapping[str, Codec], compressed: Callable[[str], dict[str, Tensor]] | None
    ) -> Iterator[Seen]:
        """The moments of every compressed site, unit by unit, and what to learn from; see `moments_again`."""
        assert self.prices is not None
        prices, learns = self.prices, self.plan.effort == "best"
        sites = [site for site in self.source.sites if site.name in assigned and prices.reached(site)]
        kept = partial(kept_sums, folder=prices.folder)
        return moments_again(self.source, self.batches, sites, kept, prices.labels, compressed, learns)


def price_folder(plan: Plan, checkpoint: Checkpoint, device: str | torch.device = "cpu", seed: int = 0) -> Priced:
    """Prices what `plan` may do to a model on disk; kept in the cache, keyed by weights, data and settings.

    Raises:
        UsageError, EffllmError: see `StoredModel`, `folder_batches` and `collect_prices`.
    """
    device = torch.device(device)
    source = StoredModel(checkpoint, torch.float32 if device.type == "cpu" else None, device)
    if not plan.solves:
        return Priced(plan, source, [], plan.options(source.sites), None)
    key = price_key(plan, checkpoint, device, seed)
    batches = folder_batches(plan.calibration, source.model, checkpoint.folder)
    return _collected(plan, source, batches, cache(key), key, seed)


def _collected(plan: Plan, source: Source, batches: Sequence[Batch], folder: Path, key: str, seed: int) -> Priced:
    """Prices found on data; says which sites have none, because the data never come by."""
    options = plan.options(source.sites)
    prices = collect_prices(source, options, batches, folder, key, seed)
    left = [name for name in options if name not in prices.losses]
    if left:
        more = ", ..." if len(left) > 1 else ""
        logger.warning("%d layers are never reached by the calibration data: %s%s", len(left), left[0], more)
    return Priced(plan, source, batches, options, prices)


def price_key(plan: Plan, checkpoint: Checkpoint, device: torch.device, seed: int) -> str:
    """Identifies prices: what they were found on, and how."""
    return data_key(checkpoint, plan.calibration, device, seed)


def price_live(plan: Plan, model: nn.Module, batches: Sequence[Batch], folder: Path, seed: int = 0) -> Priced:
    """The same for a live model, `folder` being where hidden states and statistics may lie meanwhile."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    source = LiveModel(model, torch.float32 if on_cpu else None)
    if not plan.solves:
        return Priced(plan, source, [], plan.options(source.sites), None)
    return _collected(plan, source, in_dtype(batches, source.dtype), folder, "", seed)


def cache(key: str) -> Path:
    """Where prices are kept."""
    return cache_folder("prices") / key[:16]
