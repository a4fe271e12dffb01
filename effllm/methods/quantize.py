"""Uniform quantization: per group along the input dimension, per output channel, or per matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from effllm.method import Codec
from effllm.methods._by_rows import encode_by_rows, linear_by_rows
from effllm.methods._feedback import column_weights, descend, round_with_feedback
from effllm.packing import pack, unpack

if TYPE_CHECKING:
    from effllm.moments import Metric, Moments
    from effllm.site import Site

ENCODE_CHUNK = 1 << 18  # weights per step of encode: the weights and one scratch tensor, both fp32, fit a core's cache
SHRINK = [1 - 0.05 * step for step in range(12)]  # the shares of the full range that the search tries
ROUNDS = 2  # of fitting scales to codes and codes to scales
REFINED, FITTED = 1 << 24, 1 << 24  # weights at a time, and numbers in memory for fitting their scales
RIDGE = 1e-3  # of the diagonal, against groups that can hardly be told apart
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-24, 65504.0  # of fp16


class Quantize(Codec):
    """Uniform quantization to 2-8 bits, round to nearest, one scale a group of inputs.

    A group of `group_size` consecutive inputs of one row shares an fp16 `scale` and, unless `symmetric`, an integer
    `zero` point of `bits` bits: w = (code - zero) * scale. Codes and zero points are packed bit by bit. A symmetric
    group has its zero point fixed at 2**(bits - 1) and a signed scale, so that the weight of largest magnitude is exactly
    representable. Where `group_size` does not divide the row, the last group is shorter; rows are padded to whole bytes.

    `group_size: row` makes one group of each row (an output channel), `tensor` one of the whole matrix, stored as one row.

    `range: search` shrinks the range of each group to the share, of 12 between 0.45 and 1, with the least squared error.

    With calibration data, what rounding a column loses is made up for by the columns after it (error feedback of GPTQ,
    arXiv 2210.17323, in the metric of the expected KL), and the range search counts what is left then.

    Bits per weight: bits + (16 + bits) / group_size, or bits + 16 / group_size when symmetric.

    Source: Krishnamoorthi, "Quantizing deep convolutional networks for efficient inference", arXiv 1806.08342, section 2
    (affine and symmetric quantizer); groups and the range search are the field's common practice.
    """

    paper: ClassVar[str] = "arXiv 1806.08342"
    trainable: ClassVar[tuple[str, ...]] = ("scale",)
    bits: Annotated[int, Field(ge=2, le=8, description="width of a code")] = 4
    group_size: Annotated[int, Field(ge=8)] | Literal["row", "tensor"] = 64
    symmetric: bool = False
    range: Literal["minmax", "search"] = "search"

    @property
    def by_rows(self) -> bool:  # type: ignore[override]
        return self.group_size != "tensor"

    @classmethod
    def grid(cls, site: Site) -> list[Codec]:
        fitting: list[int | Literal["row"]] = [size for size in (32, 64, 128, 256) if site.shape[1] >= size]
        return [cls(bits=bits, group_size=size) for bits in (2, 3, 4, 5, 6, 8) for size in fitting or ["row"]]

    def encode(self, weight: Tensor, moments: Moments | None = None) -> dict[str, Tensor]:
        if self.group_size == "tensor":
            weight = weight.reshape(1, -1)
        elif moments is not None:
            return _solve([self], weight, moments.solving)[0]
        return encode_by_rows(self._encode_rows, weight, ENCODE_CHUNK)

    def refine(self, data: dict[str, Tensor], weight: Tensor, moments: Moments) -> dict[str, Tensor]:
        """Scales fitted to the codes, then codes to the scales, a few times over."""
        if self.group_size == "tensor":
            return data
        metric = moments.solving
        metric.release()
        A, step = metric.damped(), max(1, REFINED // weight.shape[1])
        parts = []
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            own = {name: tensor[rows] for name, tensor in data.items()}
            parts.append(self._refined(own, weight[rows].float(), metric, A))
        return {name: torch.cat([part[name] for part in parts]) for name in data}

    def _refined(self, data: dict[str, Tensor], weight: Tensor, metric: Metric, A: Tensor) -> dict[str, Tensor]:
        rows, columns = weight.shape
        size, groups = self._groups(columns)
        scale, zero = data["scale"].float(), self._zeros(data, rows, groups)

        def spread(x: Tensor) -> Tensor:
            return x.repeat_interleave(size, 1)[:, :columns]

        def snap(part: slice, column: int, values: Tensor) -> Tensor:
            group = column // size
            return _nearest(values, scale[part, group], zero[part, group], 2**self.bits - 1)

        steps = unpack(data["codes"], self.bits, columns).float() - spread(zero)
        place = metric.order.argsort()
        wanted = (weight[:, metric.order] @ A)[:, place]
        for _ in range(ROUNDS):
            scale = _refit(wanted, steps, scale, place, A, size)
            spacing = spread(scale)
            steps = descend(weight, steps * spacing, metric, A, snap).div_(spacing).round_()
        return self._stored((steps + spread(zero)).to(torch.uint8), scale.unsqueeze(-1), zero.unsqueeze(-1))

    def decode(self, data: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        rows, columns = (1, math.prod(shape)) if self.group_size == "tensor" else shape
        size, groups = self._groups(columns)
        codes = F.pad(unpack(data["codes"], self.bits, columns), (0, groups * size - columns))
        steps = codes.reshape(rows, groups, size).float().sub_(self._zeros(data, rows, groups).unsqueeze(-1))
        return steps.mul_(data["scale"].unsqueeze(-1)).view(rows, -1)[:, :columns].reshape(shape)

    def decode_rows(self, data: dict[str, Tensor], index: Tensor | slice, shape: tuple[int, int]) -> Tensor:
        if self.group_size == "tensor":
            return self.decode(data, shape)[index]
        rows = {name: tensor[index] for name, tensor in data.items()}
        return self.decode(rows, (len(rows["codes"]), shape[1]))

    def linear(self, x: Tensor, data: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        if torch.compiler.is_compiling() or self.group_size == "tensor":
            return super().linear(x, data, shape)
        return linear_by_rows(self, x, data, shape)

    def _zeros(self, data: dict[str, Tensor], rows: int, groups: int) -> Tensor:
        """The zero point of every group, fp32 `[rows, groups]`."""
        if self.symmetric:
            return torch.full((rows, groups), 2.0 ** (self.bits - 1), device=data["codes"].device)
        return unpack(data["zero"], self.bits, groups).float()

    def _groups(self, columns: int) -> tuple[int, int]:
        size = columns if isinstance(self.group_size, str) else min(self.group_size, columns)
        return size, -(-columns // size)

    def _encode_rows(self, weight: Tensor) -> dict[str, Tensor]:
        x, columns = self._grouped(weight), weight.shape[1]
        scale, zero = self._fit(x)
        codes = self._steps(x, scale, zero, torch.empty_like(x)).add_(zero).to(torch.uint8)
        return self._stored(codes.view(len(x), -1)[:, :columns], scale, zero)

    @classmethod
    def encode_each(
        cls, codecs: Sequence[Codec], weight: Tensor, moments: Moments | None = None
    ) -> list[dict[str, Tensor]]:
        own = cast(Sequence[Quantize], codecs)
        if moments is None or any(codec.group_size == "tensor" for codec in own):
            return super().encode_each(codecs, weight, moments)
        return _solve(own, weight, moments.solving)

    def _grouped(self, weight: Tensor) -> Tensor:
        """`[rows, groups, size]` in fp32; the last group is filled up with zeros."""
        rows, columns = weight.shape
        size, groups = self._groups(columns)
        return F.pad(weight.float(), (0, groups * size - columns)).view(rows, groups, size)

    def _fit(self, x: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every group, `[rows, groups, 1]`; errors count by `importance` `[groups, size]`."""
        low, high = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
        if self.range == "minmax" or x.is_meta:  # shapes need no search
            return self._scale(low, high)
        return self._search(x, low, high, importance)

    def _stored(self, codes: Tensor, scale: Tensor, zero: Tensor) -> dict[str, Tensor]:
        stored = {"codes": pack(codes, self.bits), "scale": scale.squeeze(-1).half()}
        if not self.symmetric:
            stored["zero"] = pack(zero.squeeze(-1).to(torch.uint8), self.bits)
        return stored

    def _scale(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale (fp32 holding fp16 values) and integer zero point of the range [low, high], `[rows, groups, 1]`."""
        if self.symmetric:
            half = 2 ** (self.bits - 1)
            scale = torch.where(high > -low, high, low) / -half
            magnitude = scale.abs().clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()
            return torch.where(scale < 0, -magnitude, magnitude), torch.full_like(scale, half)
        steps = 2**self.bits - 1
        scale = ((high - low) / steps).clamp(SMALLEST_SCALE, LARGEST_SCALE).half().float()
        return scale, (-low / scale).round().clamp(0, steps)

    def _search(self, x: Tensor, low: Tensor, high: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the share of the range with the least squared error; the larger share on a tie."""
        scratch = torch.empty_like(x)
        shares = torch.tensor(SHRINK, device=x.device).view(-1, 1, 1, 1)
        scales, zeros = self._scale(low * shares, high * shares)
        errors = torch.empty_like(scales)
        for scale, zero, error in zip(scales, zeros, errors, strict=True):
            squares = self._steps(x, scale, zero, scratch).mul_(scale).sub_(x).square_()
            if importance is not None:
                squares.mul_(importance)
            torch.sum(squares, -1, keepdim=True, out=error)
        best = errors.argmin(0, keepdim=True)
        return scales.gather(0, best)[0], zeros.gather(0, best)[0]

    def _steps(self, x: Tensor, scale: Tensor, zero: Tensor, out: Tensor) -> Tensor:
        """`code - zero` of every weight, as integers in fp32. (`clamp` with tensor bounds is not vectorised.)"""
        steps = torch.div(x, scale, out=out).round_()
        torch.maximum(steps, -zero, out=steps)
        return torch.minimum(steps, 2**self.bits - 1 - zero, out=steps)


def _solve(codecs: Sequence[Quantize], weight: Tensor, metric: Metric) -> list[dict[str, Tensor]]:
    """Error feedback on ranges that are searched first, with the weights that suit it; all codecs in one pass of columns."""
    (rows, columns), importance = weight.shape, column_weights(metric)
    sizes = [codec._groups(columns)[0] for codec in codecs]
    step, run = max(1, ENCODE_CHUNK // columns), math.gcd(*sizes)
    fitted = []
    for codec, size in zip(codecs, sizes, strict=True):
        padded = F.pad(importance, (0, -columns % size)).view(-1, size)
        parts = [codec._fit(codec._grouped(part), padded) for part in weight.split(step)]
        fitted.append([torch.cat(found).squeeze(-1) for found in zip(*parts, strict=True)])

    def by_run(which: int) -> Tensor:
        """Scales or zero points of all codecs' rows, `[runs, codecs * rows]`: a run of columns is in one group of each."""
        spread = [one[which].repeat_interleave(size // run, 1) for one, size in zip(fitted, sizes, strict=True)]
        return torch.cat([one[:, : -(-columns // run)] for one in spread]).t().contiguous()

    scales, zeros = by_run(0), by_run(1)
    tops = torch.tensor([2**codec.bits - 1.0 for codec in codecs], device=weight.device).repeat_interleave(rows)

    def snap(part: slice, column: int, values: Tensor) -> Tensor:
        return _nearest(values, scales[column // run, part], zeros[column // run, part], tops[part])

    rounded = round_with_feedback(weight.repeat(len(codecs), 1) if len(codecs) > 1 else weight, metric, snap)
    stored = []
    for codec, (scale, zero), own in zip(codecs, fitted, rounded.split(rows), strict=True):
        codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        for index in torch.arange(rows, device=weight.device).split(step):
            steps = (codec._grouped(own[index]) / scale[index].unsqueeze(-1)).round_().add_(zero[index].unsqueeze(-1))
            codes[index] = steps.to(torch.uint8).view(len(index), -1)[:, :columns]
        stored.append(codec._stored(codes, scale.unsqueeze(-1), zero.unsqueeze(-1)))
    return stored


def _nearest(values: Tensor, scale: Tensor, zero: Tensor, top: Tensor | float) -> Tensor:
    """The nearest values that codes from 0 to `top` stand for."""
    return torch.minimum(torch.maximum((values / scale).round_(), -zero), top - zero).mul_(scale)


def _refit(wanted: Tensor, steps: Tensor, scale: Tensor, place: Tensor, A: Tensor, size: int) -> Tensor:
    """The scales `[rows, groups]` with the least e A e^T for each row's `steps` `[rows, columns]`: least squares, from
    `scale` on. Rows that rounding to fp16 makes worse stay. `wanted` is W A; A has the matrix's column j at `place[j]`."""
    (rows, groups), columns = scale.shape, steps.shape[1]
    found = torch.empty_like(scale)

    def by_group(x: Tensor) -> Tensor:
        return F.pad(x, (0, -x.shape[1] % size)).view(len(x), -1, size).sum(-1)

    for part in torch.arange(rows, device=A.device).split(max(1, FITTED // (groups * groups + columns))):
        own, first = steps[part], scale[part]
        normal = torch.zeros(len(part), groups, groups, device=A.device)
        for group in range(groups):
            begin, end = group * size, min((group + 1) * size, columns)
            later = A[place[begin:end]][:, place[begin:]]
            normal[:, group, group:] = by_group((own[:, begin:end] @ later).mul_(own[:, begin:]))
        normal = normal.triu() + normal.triu(1).mT
        diagonal = normal.diagonal(dim1=1, dim2=2)
        ridge = RIDGE * diagonal + torch.finfo(torch.float32).tiny
        ridge = torch.where(diagonal > 0, ridge, ridge.new_tensor(1.0))
        missing = by_group(wanted[part] * own) - (normal @ first.unsqueeze(-1)).squeeze(-1)
        change = torch.linalg.solve(normal + torch.diag_embed(ridge), missing)
        second = (first + change).half().float()
        second = torch.where(second.isfinite() & (second != 0), second, first)
        change = second - first
        gain = (change * (2 * missing - (normal @ change.unsqueeze(-1)).squeeze(-1))).sum(1, keepdim=True)
        found[part] = torch.where(gain > 0, second, first)
    return found
