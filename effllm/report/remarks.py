"""What a plan leaves undone in a model: said by the dry run and by compression alike."""

from __future__ import annotations

from torch import nn

from effllm.plans import Plan
from effllm.site import Site, norms_with_statistics
from effllm.surgery import ENOUGH, refits_norms


def remarks(model: nn.Module, sites: list[Site], plan: Plan, left: list[tuple[str, float, str]]) -> list[str]:
    """Steps with nothing to act on, large weights that stay (`left`, as `unchanged` gives them), and statistics that no
    longer fit the weights."""
    lines = [f"plan {plan.name}: {step} has nothing to act on in this model" for step in plan.idle(sites)]
    for name, share, why in left:
        lines.append(f"stays as it is: {name}, {share:.1%} of the bytes ({why})")
    lines += [f"on the loaded model: {edit.label()}" for edit in plan.edits()]
    norms = norms_with_statistics(model)
    if norms and refits_norms(model, plan):
        lines.append(f"the running statistics of {len(norms)} batch norms are refitted on the calibration data")
    elif norms:
        takes = f"{ENOUGH} calibration inputs (--samples)" if plan.needs_data else "a plan with data"
        lines.append(f"the running statistics of {len(norms)} batch norms are not refitted: that takes {takes}")
    return lines
