"""The true KL of one change at a time, all of them measured in one streamed pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from effllm.progress import track
from effllm.source import Batch, Source
from effllm.statistics.head import counted, head_logits, logits_at_once, logits_of, sites_behind

LARGEST = 80.0  # difference of logits whose exponential is a float
Weights = dict[str, Tensor]
"""Parameter -> the values that stand for it."""


def probe(
    source: Source, batches: Sequence[Batch], units: Mapping[str, str], changed: Callable[[str], Weights]
) -> dict[str, float]:
    """KL to the model, nats per token (or image), of several changes of its weights, each alone.

    `units` names for every change the block, or the site outside the blocks, that it is in; `changed` gives its weights.
    Beside the model's own forward there is one for every change, which takes over what the first computed until it comes to
    its unit. The hidden states of all are in memory, so few tokens should do. Changes that the data never reach are left
    out.
    """
    model, behind = source.model, sites_behind(source)
    places = {site.name: {site.name, *site.tied} for site in source.sites} | {block: {block} for block in source.blocks}
    walked = set((source.base if behind else model).modules())
    gates = [name for unit in units.values() for name in places[unit] if model.get_submodule(name) in walked]
    changes, count = [None, *units], len(batches)
    results: list[Any] = []
    made: set[str | None] = {None}
    walk = source.walk([batch for _ in changes for batch in batches], gates, results=results, whole=not behind)
    for gate, calls in track(walk, "probes"):
        for call in calls:
            change = changes[call.number // count]
            if change is not None and gate in places[units[change]]:
                made.add(change)
                with source.changed(changed(change)):
                    call.run()
            elif change in made:
                call.run()
            else:
                call.output = next(own.output for own in calls if own.number == call.number % count)
    at_head = {change for change, unit in units.items() if any(unit == site.name for site in behind)}
    reached = [change for change in changes if change in made | at_head]
    groups = {change: results[place * count :][:count] for place, change in enumerate(changes)}
    if not behind:
        logits = {change: [logits_of(result) for result in groups[change]] for change in reached}
        masks = [counted(batch, one.shape[:-1]) for batch, one in zip(batches, logits[None], strict=True)]
        return {change: _mean(logits[None], logits[change], masks) for change in reached if change is not None}
    with source.resident(*source.units_of(behind)):
        weights = {change: changed(change) if change in at_head else {} for change in reached if change is not None}
        return _behind(source, batches, [groups[change] for change in reached], weights)


@torch.no_grad()
def _behind(
    source: Source, batches: Sequence[Batch], results: list[list[Any]], weights: dict[str, Weights]
) -> dict[str, float]:
    """The same, from what the base model returned for each batch, the unchanged model first; `weights` are of the head."""
    totals, labels = dict.fromkeys(weights, 0.0), 0
    step, kind = logits_at_once(source.model), type(results[0][0])
    for number, batch in enumerate(batches):
        states = [result[number].last_hidden_state for result in results]
        mask = counted(batch, states[0].shape[:2])
        labels += int(mask.sum())
        for start in range(0, len(mask), step):
            part = slice(start, start + step)
            own, *others = (state.flatten(0, 1)[part].unsqueeze(0) for state in states)
            expected = head_logits(source, batch, kind, own).float()
            chances = expected.softmax(-1)
            for change, piece in zip(weights, others, strict=True):
                with source.changed(weights[change]):
                    logits = head_logits(source, batch, kind, piece)
                costs = divergence(expected, logits, chances).flatten()
                totals[change] += float((costs * mask[part].to(costs.device)).sum())
    return {change: total / labels for change, total in totals.items()}


def _mean(own: list[Tensor], other: list[Tensor], positions: list[Tensor]) -> float:
    pairs = zip(own, other, positions, strict=True)
    costs = [divergence(one, two).flatten()[mask.to(one.device)] for one, two, mask in pairs]
    return float(torch.cat(costs).mean())


def divergence(own: Tensor, other: Tensor, chances: Tensor | None = None) -> Tensor:
    """KL(own || other) of logits `[..., classes]`, fp32 `[...]`; `chances` are the softmax of `own`, where it is known.

    With d the difference of the logits less its mean under p, log(1 + sum p (exp(d) - 1)): exact where d is small.
    """
    own = own.detach().float()
    p = own.softmax(-1) if chances is None else chances
    change = other.detach().float() - own
    change -= (p * change).sum(-1, keepdim=True)
    if float(change.amax()) > LARGEST:
        return (change + p.log()).logsumexp(-1)
    return change.expm1_().mul_(p).sum(-1).log1p_()
