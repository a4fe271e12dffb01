"""The moments of every weight once more, unit by unit, from what a sweep has kept: for the encoding of the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from effllm.moments import Moments
from effllm.site import Site
from effllm.source import Batch, Source
from effllm.statistics.sweep import experts_one_by_one
from effllm.statistics.tap import Replay, Sums, moments_of, share_experts

Kept = Callable[[Site], list[Sums]]


def moments_again(
    source: Source, batches: Sequence[Batch], sites: Sequence[Site], kept: Kept, labels: int,
    compressed: Callable[[str], dict[str, Tensor]] | None = None,
) -> Iterator[tuple[str, dict[str, Moments]]]:  # fmt: skip
    """Yields (unit, site -> moments) for each unit that holds some of `sites`: those outside the blocks, then the blocks.

    A block's inputs are weighted by what the sweep has kept (`kept`), and summed while all `batches` pass it. With
    `compressed`, which gives the new weights of a block once it was yielded, the batches pass it again with these, and later
    blocks see what the compressed ones return.
    """
    blocks = {block: [site for site in sites if site.block == block] for block in source.blocks}
    outside = [site for site in sites if site.block is None]
    for unit in source.units_of(outside):
        members = [site for site in outside if site.parameter in source.units[unit]]
        yield unit, moments_of({site.name: kept(site) for site in members}, labels)
    if not any(blocks.values()):
        return
    for gate, calls in source.walk(batches):
        if not blocks.get(gate):
            continue
        tap = Replay(source.model, blocks[gate], {site.name: kept(site) for site in blocks[gate]})
        for call in calls:
            with experts_one_by_one(source.model.get_submodule(gate)), tap:
                call.run()
        share_experts(tap.sums, blocks[gate])
        yield gate, moments_of(tap.sums, labels)
        if compressed is not None:
            with source.changed(compressed(gate)):
                for call in calls:
                    call.run()
        blocks.pop(gate)
