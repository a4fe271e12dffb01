"""Listening at weights while a model runs: what multiplies them, and the gradients that come back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from effllm.site import Site
from effllm.statistics.sums import Sums

POSITIONS = 1 << 14  # of a convolution's output that are kept of one call
CONVOLUTIONS: tuple[Any, ...] = (torch.conv1d, torch.conv2d, torch.conv3d)
PRODUCTS: tuple[Any, ...] = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)


class Tap(TorchFunctionMode):
    """While it is open, every use of the weights of `sites` in `model` is summed; after a backward call `flush`.

    A weight is recognised by where its values lie, so that Linear, Conv1D, convolutions, embeddings and single experts of a
    stacked parameter are all found where torch multiplies by them: the weights must stay where they are while it is used.

    Args:
        model, sites: whose weights.
        sums: site -> the sums of its uses, to be added to.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], sums: dict[str, list[Sums]] | None = None):
        super().__init__()
        self.sums = {} if sums is None else sums
        self._sites = {_address(site, model): site for site in sites}
        self._seen: list[tuple[Sums, Tensor, list[Tensor]]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in PRODUCTS:
            x, weight = args[0], kwargs.get("weight", args[1] if len(args) > 1 else None)
            if func is F.linear or self._site(x) is None:
                self._listen(weight, out, lambda site: (1, _flat(x).unsqueeze(1)))
            else:  # weight @ inputs
                turned = weight.transpose(-1, -2)
                self._listen(x, out, lambda site: (1, _flat(turned).unsqueeze(1)), lambda g: _flat(g.transpose(-1, -2)))
        elif func is torch.addmm:
            self._listen(args[2], out, lambda site: (1, _flat(args[1]).unsqueeze(1)))
        elif func in CONVOLUTIONS:
            return self._convolution(out, *args, **kwargs)
        elif func is F.embedding:
            index, weight = args[0], kwargs.get("weight", args[1] if len(args) > 1 else None)
            self._listen(weight, out, lambda site: (1, index.flatten()), is_lookup=True)
        return out

    def _convolution(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1,
                     padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Tensor:  # fmt: skip
        batched = out.dim() == weight.dim()
        positions = _spread(math.prod(out.shape[2:]) * len(out) if batched else 0)

        def inputs(site: Site) -> tuple[int, Tensor]:
            return groups, _patches(x, weight, stride, padding, dilation, groups)[positions]

        if batched:
            self._listen(weight, out, inputs, lambda g: g.movedim(1, -1).flatten(0, -2)[positions])
        return out

    def _listen(self, weight: Any, out: Tensor, inputs: Callable[[Site], tuple[int, Tensor]],
                rows: Callable[[Tensor], Tensor] | None = None, is_lookup: bool = False) -> None:  # fmt: skip
        site = self._site(weight)
        if site is None or not out.is_floating_point():
            return
        if not out.requires_grad:
            out.requires_grad_()
        parts, x = inputs(site)
        uses = self.sums.setdefault(site.name, [])
        sums = next((sums for sums in uses if sums.is_lookup == is_lookup), None)
        if sums is None:
            sums = Sums(site.shape, parts, is_lookup)
            uses.append(sums)
        grads: list[Tensor] = []
        out.register_hook(lambda g: grads.append((rows or _flat)(g.detach()).float()))
        self._seen.append((sums, x.detach(), grads))

    def _site(self, weight: Any) -> Site | None:
        return self._sites.get(weight.data_ptr()) if isinstance(weight, Tensor) and not weight.is_meta else None

    def flush(self) -> None:
        """Adds what the last forward and its backwards have brought."""
        for sums, x, grads in self._seen:
            if grads and sums.is_lookup:
                sums.add_lookups(x, grads)
            elif grads:
                sums.add_product(x.float(), grads)
        self._seen.clear()


class Replay(Tap):
    """A tap for a second forward, without a backward: the inputs are weighted by what an earlier sweep has kept.

    `sums` are its, with the token weights in the order in which the weight sees its tokens.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], sums: dict[str, list[Sums]]):
        super().__init__(model, sites, sums)
        self._places: dict[str, int] = {}

    def _listen(self, weight: Any, out: Tensor, inputs: Callable[[Site], tuple[int, Tensor]],
                rows: Callable[[Tensor], Tensor] | None = None, is_lookup: bool = False) -> None:  # fmt: skip
        site = self._site(weight)
        if site is None or is_lookup:
            return
        use = next(use for use in self.sums[site.name] if not use.is_lookup)
        x, start = inputs(site)[1].float(), self._places.get(site.name, 0)
        self._places[site.name] = start + len(x)
        energy = torch.cat(use.energies)[start : start + len(x)]
        if site.expert is not None:  # routing may differ where the inputs do
            energy = torch.cat(use.energies).mean(0).expand(len(x), -1)
        use.add_inputs(x, energy)


def _address(site: Site, model: nn.Module) -> int:
    weight = model.get_parameter(site.parameter)
    return (weight if site.expert is None else weight[site.expert]).data_ptr()


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _spread(count: int) -> Tensor:
    return torch.arange(0, count, max(1, -(-count // POSITIONS)))


def _patches(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
    """What a convolution multiplies its weight with, `[images * positions, groups, channels / groups * kernel]`."""
    sizes = weight.shape[2:]
    strides, gaps = _each(stride, len(sizes)), _each(dilation, len(sizes))
    if padding == "same":
        whole = [gap * (size - 1) for gap, size in zip(gaps, sizes, strict=True)]
        around = [(pad // 2, pad - pad // 2) for pad in whole]
    else:
        around = [(pad, pad) for pad in _each(0 if padding == "valid" else padding, len(sizes))]
    x = F.pad(x, [side for pair in reversed(around) for side in pair])
    for axis, (size, step, gap) in enumerate(zip(sizes, strides, gaps, strict=True), start=2):
        x = x.unfold(axis, gap * (size - 1) + 1, step)[..., ::gap]
    count = len(sizes)
    x = x.movedim(1, count + 1).flatten(0, count).flatten(1)
    return x.view(len(x), groups, -1)


def _each(value: int | Sequence[int], count: int) -> list[int]:
    return [value] * count if isinstance(value, int) else list(value)
