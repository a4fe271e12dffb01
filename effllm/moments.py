"""What an error in a weight is expected to cost: the metric in which every codec is priced and solved."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

DAMPING = 0.01  # of the mean diagonal, added to it before a factorisation
CHUNK = 1 << 20  # numbers that are moved at once
INVERTED_AT_ONCE, MULTIPLIED_AT_ONCE = 256, 1024  # columns


class Metric:
    """A quadratic form on errors of rows, e -> e A e^T, with its factorisation, made once for all options of a weight.

    Args:
        A: fp32 `[parts, width, width]`, symmetric. With `width` equal to the weight's columns, equal runs of rows have a
            part each (the groups of a convolution; one part otherwise). With a smaller width the form is block-diagonal:
            a part for each run of columns (a diagonal where the width is 1).
        columns: of the weight.
    """

    def __init__(self, A: Tensor, columns: int):
        self.A, self.columns = A, columns

    @property
    def by_columns(self) -> bool:
        """Whether the parts are runs of columns, not of rows."""
        return self.A.shape[-1] < self.columns

    def energies(self, errors: Tensor, places: Tensor) -> Tensor:
        """e A e^T of every row of `errors` `[n, columns]`, fp32 `[n]`; `places` `[n]`, from 0 to 1, is where in the weight
        each row lies."""
        parts, width, _ = self.A.shape
        errors = errors.float()
        if self.by_columns:
            errors = F.pad(errors, (0, parts * width - self.columns)).view(-1, parts, width)
            return torch.einsum("rpw,pwv,rpv->r", errors, self.A, errors)
        if parts == 1:
            return _symmetric(errors, self.A[0])
        return torch.einsum("rc,rcd,rd->r", errors, self.A[(places * parts).long()], errors)

    @cached_property
    def dense(self) -> Tensor:
        """The form as one matrix `[columns, columns]`; of parts of rows their mean."""
        if self.by_columns:
            whole: Tensor = torch.block_diag(*self.A)  # type: ignore[no-untyped-call]
            return whole[: self.columns, : self.columns]
        return self.A[0] if len(self.A) == 1 else self.A.mean(0)

    @cached_property
    def order(self) -> Tensor:
        """Columns by falling energy, int64 `[columns]`."""
        return self.dense.diagonal().argsort(descending=True, stable=True)

    def damped(self, times: float = 1.0) -> Tensor:
        """`dense` with rows and columns in `order`, and 1 % (or so many `times` that) of its mean diagonal added to the
        diagonal; the identity where it is zero. Made anew at each call: nothing of its size is kept."""
        damped = self.dense[self.order.unsqueeze(1), self.order]
        mean = damped.diagonal().mean()
        damped.diagonal().add_(times * DAMPING * mean if mean > 0 else 1.0)
        return damped

    @cached_property
    def factor(self) -> Tensor:
        """The upper triangular U with U^T U = damped^-1, in `order`; damped more where that does not exist."""
        for power in range(8):
            factor = _inverse_factor(self.damped(10.0**power))
            if factor is not None:
                return factor
        return torch.diag(self.damped().diagonal().rsqrt())

    def release(self) -> None:
        """Lets `factor` go, which is as large as the metric."""
        self.__dict__.pop("factor", None)


def _symmetric(errors: Tensor, A: Tensor) -> Tensor:
    """e A e^T of every row: what lies above the diagonal blocks is multiplied once and counted twice."""
    found = errors.new_zeros(len(errors))
    for start in range(0, len(A), MULTIPLIED_AT_ONCE):
        stop = start + MULTIPLIED_AT_ONCE
        own, rows = errors[:, start:stop], A[start:stop]
        found += ((own @ rows[:, start:stop]) * own).sum(1)
        found += 2 * ((own @ rows[:, stop:]) * errors[:, stop:]).sum(1)
    return found


def _inverse_factor(A: Tensor) -> Tensor | None:
    """The upper triangular U with U^T U = A^-1, in the memory of a symmetric A `[n, n]`; None where rounding makes it none.

    With rows and columns in reverse order A = L L^T; so U is the inverse of L, back in order.
    """
    _reverse(A)
    lower, info = A.mT, torch.empty((), dtype=torch.int32, device=A.device)  # transposed it lies as LAPACK wants it
    torch.linalg.cholesky_ex(lower, out=(lower, info))
    if info:
        return None
    _invert_lower(lower)
    _reverse(A)
    return lower if lower.sum().isfinite() else None


def _reverse(A: Tensor) -> None:
    """Rows and columns in reverse order, in place: those of a contiguous matrix are its numbers in reverse order."""
    numbers = A.view(-1)
    for start in range(0, len(numbers) // 2, CHUNK):
        stop = min(start + CHUNK, len(numbers) // 2)
        front, back = numbers[start:stop], numbers[len(numbers) - stop : len(numbers) - start]
        kept = front.flip(0)
        front.copy_(back.flip(0))
        back.copy_(kept)


def _invert_lower(L: Tensor) -> None:
    """Inverts a lower triangular matrix in place, half by half."""
    if len(L) <= INVERTED_AT_ONCE:
        one = torch.eye(len(L), device=L.device)
        L.copy_(torch.linalg.solve_triangular(L, one, upper=False))
        return
    half = len(L) // 2
    first, second, below = L[:half, :half], L[half:, half:], L[half:, :half]
    _invert_lower(first)
    _invert_lower(second)
    below.copy_(-(second @ below) @ first)


@dataclass(frozen=True)
class Moments:
    """The expected cost of an error E in a weight: KL = 1/2 sum_o rows[o] E_o A E_o^T, nats per token (or image).

    A = sum_t |g_t|^2 x_t x_t^T over calibration tokens; x_t is the weight's input and g_t the gradient, at its output, of
    the loss of a label drawn from the model. `rows` `[rows]` is each output's share of the gradients' energy, divided by
    the number of labels. (A factored Fisher information whose first factor weights every token by its gradient: with the
    textbook factors E[xx^T] and E[gg^T] a first token of huge input and small gradient spoils the price.)

    Of an embedding: A = diag(sum_t g_tj^2), and `rows` is how often each entry is looked up, a share divided likewise. A
    tied weight has both uses.
    """

    metric: Metric
    rows: Tensor
    other: Moments | None = None
    """The weight's second use."""

    def costs(self, errors: Tensor, index: Tensor | None = None) -> Tensor:
        """Nats per token that each row of `errors` `[n, columns]` costs, fp32 `[n]`; `index` `[n]` names the rows."""
        count = len(self.rows)
        index = torch.arange(count, device=errors.device) if index is None else index
        costs = 0.5 * self.rows[index] * self.metric.energies(errors, index / count)
        return costs if self.other is None else costs + self.other.costs(errors, index)

    def of(self, index: Tensor) -> Moments:
        """The moments of the rows `index` alone; the factorisation is shared."""
        part = Moments(self.metric, self.rows[index], self.other.of(index) if self.other else None)
        part.__dict__["solving"] = self.solving
        return part

    @cached_property
    def importance(self) -> Tensor:
        """What one unit of error costs in each row, fp32 `[rows]`, on an average input."""
        own: Tensor = self.rows * self.metric.dense.diagonal().mean()
        return own + self.other.importance if self.other else own

    @cached_property
    def solving(self) -> Metric:
        """The one metric in which an encoder solves all rows: that of the weight's use, or the sum of its uses."""
        if self.other is None:
            return self.metric
        return Metric((self.metric.dense + self.other.solving.dense)[None], self.metric.columns)
