"""The moments of every weight once more, unit by unit, from what a sweep has kept: for the encoding of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effllm.moments import Moments
from effllm.site import Site
from effllm.source import Batch, Source
from effllm.source.lockstep import Call
from effllm.statistics.head import positions
from effllm.statistics.sums import Sums, moments_of, share_experts
from effllm.statistics.sweep import DRAWS, experts_one_by_one
from effllm.statistics.tap import Replay

AT_ONCE = 2  # inputs of an example
Kept = Callable[[str, int], list[Sums]]
"""Name and columns of a weight, or name of a block and 0 -> what the sweep has kept of it."""


@dataclass(frozen=True)
class Example:
    """One call of a block: what it is given, what it should return, and what an error there costs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Tensor
    """`[positions, channels]`."""
    cost: Tensor
    """Nats of a squared error of all channels together, fp32 `[positions]`."""


@dataclass(frozen=True)
class Seen:
    """What came by at a unit of `source`, whose weights are resident."""

    source: Source
    unit: str
    moments: dict[str, Moments]
    examples: Sequence[Example] = ()
    """Of a block, where they are asked for."""
    channels: Tensor | None = None
    """The share of each channel of the block's output in the cost, fp32 `[channels]`."""


def moments_again(
    source: Source, batches: Sequence[Batch], sites: Sequence[Site], kept: Kept, labels: int,
    compressed: Callable[[str], dict[str, Tensor]] | None, with_examples: bool = False,
) -> Iterator[Seen]:  # fmt: skip
    """Yields each unit that holds some of `sites`: those outside the blocks, then the blocks.

    A block's inputs are weighted by what the sweep has kept (`kept`), and summed while all `batches` pass it. With
    `compressed`, which gives the new weights of a block once it was yielded, the batches pass it again with these, and later
    blocks see what the compressed ones return; what they should return stays what the original model's do.
    """
    batches = _smaller(batches) if with_examples else batches
    blocks = {block: [site for site in sites if site.block == block] for block in source.blocks}
    outside = [site for site in sites if site.block is None]
    for unit in source.units_of(outside):
        members = [site for site in outside if site.parameter in source.units[unit]]
        yield Seen(source, unit, moments_of({s.name: kept(s.name, s.shape[1]) for s in members}, labels))
    if not any(blocks.values()):
        return
    twice = with_examples and compressed is not None
    for gate, calls in source.walk([*batches, *batches] if twice else batches):
        members = blocks.pop(gate, [])
        if not members:
            continue
        original, calls = (
            [call for call in calls if call.number < len(batches)],
            calls[len(calls) // 2 if twice else 0 :],
        )
        tap = Replay(source.model, members, {site.name: kept(site.name, site.shape[1]) for site in members})
        for call in calls:
            with experts_one_by_one(source.model.get_submodule(gate)), tap:
                call.run()
        share_experts(tap.sums, members)
        found = moments_of(tap.sums, labels)
        if with_examples:
            if twice:
                for call in original:
                    call.run()
            (output,) = kept(gate, 0)
            yield Seen(source, gate, found, _examples(calls, original, output), output.rows / output.rows.sum())
        else:
            yield Seen(source, gate, found)
        if compressed is not None:
            with source.changed(compressed(gate)):
                for call in calls:
                    call.run()


def _smaller(batches: Sequence[Batch]) -> list[Batch]:
    """The same inputs in the same order, at most `AT_ONCE` together; batches whose inputs cannot be told apart are left."""
    found: list[Batch] = []
    for batch in batches:
        count = len(next(iter(batch.values())))
        if len(batch) > 1 and not all(value.dim() == 2 and len(value) == count for value in batch.values()):
            found.append(batch)
            continue
        for start in range(0, count, AT_ONCE):
            found.append({name: value[start : start + AT_ONCE] for name, value in batch.items()})
    return found


def _examples(calls: Sequence[Call], original: Sequence[Call], output: Sums) -> list[Example]:
    """None where a block is passed more than once, for then it is not known which passing has which gradients."""
    targets = [positions(call.returned) for call in original]
    costs = torch.cat(output.energies).flatten() / DRAWS
    if sum(map(len, targets)) != len(costs):
        return []
    split = costs.split([len(target) for target in targets])
    return [Example(c.args, c.kwargs, target, cost) for c, target, cost in zip(calls, targets, split, strict=True)]
