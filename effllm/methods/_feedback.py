"""Second-order error feedback: what rounding one column loses is made up for by the columns that are rounded after it.

For any grid. The order of columns and the compensation follow GPTQ (Frantar et al., arXiv 2210.17323, section 3, with its
activation order), in the metric of `effllm.moments`, whose inputs are weighted by the gradients' energy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

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
    weights = torch.empty_like(metric.factor.diagonal())
    weights[metric.order] = metric.factor.diagonal().square().reciprocal()
    return weights


def round_with_feedback(weight: Tensor, metric: Metric, snap: Snap) -> Tensor:
    """`weight` `[rows, columns]` on the grid of `snap`, fp32, with small e A e^T for the error e of every row."""
    order, factor = metric.order, metric.factor
    columns, rounded = order.tolist(), torch.empty(weight.shape, device=weight.device)
    for rows in _portions(weight):
        left = _turned(weight[rows], order)

        def step(place: int, rows: slice = rows, left: Tensor = left) -> Tensor:
            values = snap(rows, columns[place], left[place])
            error = torch.sub(left[place], values).div_(factor[place, place])
            left[place] = values
            return error

        _run(left, factor, step)
        rounded[rows] = left[order.argsort()].t()
    return rounded


def descend(weight: Tensor, rounded: Tensor, metric: Metric, A: Tensor, snap: Snap) -> Tensor:
    """`rounded`, which approximates `weight`, with every column once more at its best value on the grid, given all others.

    Coordinate descent: e A e^T never rises. Both are `[rows, columns]`, fp32; A is `metric.damped()`.
    """
    order = metric.order
    columns, found = order.tolist(), torch.empty_like(rounded)
    for rows in _portions(weight):
        now = _turned(rounded[rows], order)
        slope = A @ (_turned(weight[rows], order) - now)

        def step(place: int, rows: slice = rows, now: Tensor = now, slope: Tensor = slope) -> Tensor:
            values = snap(rows, columns[place], torch.add(now[place], slope[place], alpha=1 / float(A[place, place])))
            change = values - now[place]
            now[place] = values
            return change

        _run(slope, A, step)
        found[rows] = now[order.argsort()].t()
    return found


def _portions(weight: Tensor) -> Iterator[slice]:
    rows = max(1, AT_ONCE // weight.shape[1])
    return (slice(start, start + rows) for start in range(0, len(weight), rows))


def _turned(rows: Tensor, order: Tensor) -> Tensor:
    """Columns in `order`, one after the other, fp32."""
    return rows.float().t()[order].contiguous()


def _run(state: Tensor, coupling: Tensor, step: Callable[[int], Tensor]) -> None:
    """`_sweep` over all columns."""
    with _threads_for(state.numel()):
        _sweep(state, torch.empty_like(state), coupling, slice(0, len(state)), step)


def _sweep(state: Tensor, changes: Tensor, coupling: Tensor, span: slice, step: Callable[[int], Tensor]) -> None:
    """Takes `step` at the columns `span` of `state` `[columns, rows]`, in order; what each returns is taken off the later
    ones, times their `coupling` `[columns, columns]`: one half, what it owes the other, and the other."""
    first, last = span.start, span.stop
    if last - first > COLUMNS:
        middle = (first + last) // 2
        _sweep(state, changes, coupling, slice(first, middle), step)
        state[middle:last].addmm_(coupling[first:middle, middle:last].t(), changes[first:middle], alpha=-1)
        _sweep(state, changes, coupling, slice(middle, last), step)
        return
    for place in range(first, last):
        changes[place] = step(place)
        state[place + 1 : last].addr_(coupling[place, place + 1 : last], changes[place], alpha=-1)


@contextlib.contextmanager
def _threads_for(weights: int) -> Iterator[None]:
    """One thread where there is so little to do that threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if weights < SMALL else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
