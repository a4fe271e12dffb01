"""Second-order error feedback: what rounding one column loses is made up for by the columns that are rounded after it.

For any grid. The order of columns and the compensation follow GPTQ (Frantar et al., arXiv 2210.17323, section 3, with its
activation order), in the metric of `effllm.moments`, whose inputs are weighted by the gradients' energy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from effllm.moments import Metric

COLUMNS = 8  # at most, that are compensated one by one; more of them by a product of matrices
AT_ONCE = 1 << 24  # weights in fp32, and as many errors
SMALL = 1 << 22  # weights, below which one thread is quickest

Snap = Callable[[slice, int, Tensor], Tensor]
"""(rows, column, values `[rows]`) -> the nearest values of the grid there."""


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
    step = max(1, AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        left = weight[rows].float().t()[order].contiguous()
        with _threads_for(left.numel()):
            _round(left, torch.empty_like(left), factor, order.tolist(), slice(0, len(left)), partial(snap, rows))
        rounded[rows] = left[order.argsort()].t()
    return rounded


def _round(
    left: Tensor, errors: Tensor, factor: Tensor, order: list[int], span: slice, snap: Callable[[int, Tensor], Tensor]
) -> None:
    """Rounds the columns `span` of `left` `[columns, rows]` in place: one half, what it owes the other, and the other."""
    first, last = span.start, span.stop
    if last - first > COLUMNS:
        middle = (first + last) // 2
        _round(left, errors, factor, order, slice(first, middle), snap)
        left[middle:last].addmm_(factor[first:middle, middle:last].t(), errors[first:middle], alpha=-1)
        _round(left, errors, factor, order, slice(middle, last), snap)
        return
    for place in range(first, last):
        values = snap(order[place], left[place])
        torch.sub(left[place], values, out=errors[place]).div_(factor[place, place])
        left[place + 1 : last].addr_(factor[place, place + 1 : last], errors[place], alpha=-1)
        left[place] = values


@contextlib.contextmanager
def _threads_for(weights: int) -> Iterator[None]:
    """One thread where there is so little to do that threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if weights < SMALL else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
