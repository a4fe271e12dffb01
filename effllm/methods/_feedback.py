"""Second-order error feedback: what rounding one column loses is made up for by the columns that are rounded after it.

For any grid. The order of columns and the compensation follow GPTQ (Frantar et al., arXiv 2210.17323, section 3, with its
activation order), in the metric of `effllm.moments`, whose inputs are weighted by the gradients' energy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from effllm.moments import Metric

COLUMNS = 128  # that are compensated one by one before the rest is, with one product
ROWS = 1 << 13  # at a time

Snap = Callable[[int, slice, Tensor], Tensor]
"""(column, rows, values `[rows]`) -> the nearest values of the grid there."""


def column_weights(metric: Metric) -> Tensor:
    """What a rounding error in each column costs once the later columns have made up for it, fp32 `[columns]`.

    The conditional variance 1 / U_jj^2, U^T U being the inverse metric in the order of rounding. Weighted so, a clipped
    range or a codebook suits error feedback; the metric's diagonal does not, for it counts what compensation removes.
    """
    order, factor = metric.factor
    weights = torch.empty_like(factor.diagonal())
    weights[order] = factor.diagonal().square().reciprocal()
    return weights


def round_with_feedback(weight: Tensor, metric: Metric, snap: Snap) -> Tensor:
    """`weight` `[rows, columns]` on the grid of `snap`, fp32, with small e A e^T for the error e of every row."""
    order, factor = metric.factor
    rounded = torch.empty(weight.shape, device=weight.device)
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        left = weight[rows].float().t()[order].contiguous()
        for first in range(0, len(order), COLUMNS):
            block, errors = left[first : first + COLUMNS], torch.empty_like(left[first : first + COLUMNS])
            within = factor[first : first + COLUMNS, first : first + COLUMNS]
            for place in range(len(block)):
                values = snap(int(order[first + place]), rows, block[place])
                errors[place] = (block[place] - values) / within[place, place]
                block[place + 1 :].addr_(within[place, place + 1 :], errors[place], alpha=-1)
                block[place] = values
            left[first + COLUMNS :].addmm_(factor[first : first + COLUMNS, first + COLUMNS :].t(), errors, alpha=-1)
        rounded[rows] = left[order.argsort()].t()
    return rounded
