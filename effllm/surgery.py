"""Repairs of a model after its weights have changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from effllm.plans import Plan
from effllm.site import norms_with_statistics
from effllm.source import Batch, run_batch

STATISTICS = ("running_mean", "running_var")
AT_ONCE = 64  # inputs of one forward
ENOUGH = 256  # inputs from which new statistics are better than stale ones at mild compression too (docs/vision.md)


def refits_norms(model: nn.Module, plan: Plan) -> bool:
    """Whether the batch norms of `model` get new statistics from the plan's calibration data."""
    return bool(norms_with_statistics(model)) and plan.needs_data and plan.calibration.samples >= ENOUGH


@torch.no_grad()
def refit_norms(model: nn.Module, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Sets the running mean and variance of every batch norm to those of the inputs: means over batches of 64.

    A batch norm fits the distribution that the layers before it gave when it was trained, and a change of their weights
    shifts that. No labels are used and no weight changes. Returns the new statistics by their names in the state dict.

    Source: Cai et al., "Once-for-All", arXiv 1908.09791, which resets statistics for each sub-network.
    """
    norms = norms_with_statistics(model)
    before = {name: (norm.training, norm.momentum, norm.num_batches_tracked) for name, norm in norms.items()}
    inputs = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    device = next(model.parameters()).device
    try:
        for norm in norms.values():
            norm.num_batches_tracked = torch.zeros((), dtype=torch.long, device=device)
            norm.reset_running_stats()
            norm.train().momentum = None  # the plain mean over batches
        for start in range(0, len(next(iter(inputs.values()))), AT_ONCE):
            run_batch(model, {key: tensor[start : start + AT_ONCE] for key, tensor in inputs.items()}, device)
    finally:
        for name, norm in norms.items():
            training, norm.momentum, norm.num_batches_tracked = before[name]
            norm.train(training)
    return {f"{name}.{key}": getattr(norm, key) for name, norm in norms.items() for key in STATISTICS}
