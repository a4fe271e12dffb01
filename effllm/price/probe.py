"""The true KL of one change at a time, all of them measured in one streamed pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effllm.report.progress import track
from effllm.source import Batch, Source, run_batch
from effllm.statistics.sweep import LOGITS, counted, logits_of, returning, sites_behind

Weights = dict[str, Tensor]
"""Parameter -> the values that stand for it."""


def probe(
    source: Source, batches: Sequence[Batch], units: Sequence[str], changed: Callable[[str], Weights]
) -> dict[str, float]:
    """KL to the model, nats per token (or image), with the weights of each of `units` changed, one unit at a time.

    A unit is a block or a site outside the blocks; `changed` gives its new weights. Beside the model's own forward there is
    one for every unit, which takes over what the first computed until it comes to its unit. The hidden states of all are in
    memory, so few tokens should do. Units that the data never reach are left out.
    """
    model, behind = source.model, sites_behind(source)
    places = {site.name: {site.name, *site.tied} for site in source.sites} | {block: {block} for block in source.blocks}
    walked = set((source.base if behind else model).modules())
    gates = [name for unit in units for name in places[unit] if model.get_submodule(name) in walked]
    lanes, count = [None, *units], len(batches)
    results: list[Any] = []
    left: set[str | None] = {None}
    walk = source.walk([batch for _ in lanes for batch in batches], gates, results=results, whole=not behind)
    for gate, calls in track(walk, "probes"):
        for call in calls:
            unit = lanes[call.number // count]
            if unit is not None and gate in places[unit]:
                left.add(unit)
                with source.changed(changed(unit)):
                    call.run()
            elif unit in left:
                call.run()
            else:
                call.output = next(own.output for own in calls if own.number == call.number % count)
    if behind:
        heads = {site.name: {site.parameter} for site in behind}
        left |= heads.keys() & set(units)
        reached = [(number, unit) for number, unit in enumerate(lanes) if unit in left]
        with source.resident(*source.units_of(behind)):
            at_head = {unit: changed(unit) if unit in heads else {} for _, unit in reached if unit}
            states = [[results[lane * count + n].last_hidden_state for n in range(count)] for lane, _ in reached]
            kind = type(results[0])
            return _behind(source, batches, [unit for _, unit in reached if unit], states, at_head, kind)
    logits = {unit: [logits_of(r) for r in results[lane * count :][:count]] for lane, unit in enumerate(lanes)}
    positions = [counted(batch, one.shape[:-1]) for batch, one in zip(batches, logits[None], strict=True)]
    return {unit: _mean(logits[None], logits[unit], positions) for unit in units if unit in left}


def _behind(
    source: Source, batches: Sequence[Batch], units: list[str], states: list[list[Tensor]],
    changed: dict[str, Weights], kind: Any,
) -> dict[str, float]:  # fmt: skip
    """The same, from the hidden states `[batch, length, width]` of each lane's batches, the unchanged lane first."""
    totals, labels = dict.fromkeys(units, 0.0), 0
    step = max(1, LOGITS // source.model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
    for number, batch in enumerate(batches):
        mask = counted(batch, states[0][number].shape[:2])
        labels += int(mask.sum())
        lanes = [lane[number].flatten(0, 1) for lane in states]
        for start in range(0, len(mask), step):
            part = slice(start, start + step)
            own = _logits(source, batch, kind(last_hidden_state=lanes[0][part].unsqueeze(0)))
            for unit, lane in zip(units, lanes[1:], strict=True):
                with source.changed(changed[unit]):
                    logits = _logits(source, batch, kind(last_hidden_state=lane[part].unsqueeze(0)))
                totals[unit] += float((divergence(own, logits).flatten() * mask[part].to(logits.device)).sum())
    return {unit: total / labels for unit, total in totals.items()}


@torch.no_grad()
def _logits(source: Source, batch: Batch, result: Any) -> Tensor:
    with returning(source.base, result):
        return logits_of(run_batch(source.model, batch, source.device))


def _mean(own: list[Tensor], other: list[Tensor], positions: list[Tensor]) -> float:
    pairs = zip(own, other, positions, strict=True)
    costs = [divergence(one, two).flatten()[mask.to(one.device)] for one, two, mask in pairs]
    return float(torch.cat(costs).mean())


def divergence(own: Tensor, other: Tensor) -> Tensor:
    """KL(own || other) of logits `[..., classes]`, fp32 `[...]`."""
    p, q = own.detach().float().log_softmax(-1), other.detach().float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
