"""Listening at weights while a model runs: what multiplies them, and the gradients that come back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from effllm.moments import Metric, Moments
from effllm.site import Site

WIDEST = 16384  # columns; above, the metric is block-diagonal
WIDTH = 1024  # of those blocks
POSITIONS = 1 << 14  # of a convolution's output that are kept of one call
PSEUDO_TOKENS = 32  # of its layer's average, that an expert is given
SMOOTHING = 1.0  # look-ups that every entry of an embedding is given beside those counted
CONVOLUTIONS: tuple[Any, ...] = (torch.conv1d, torch.conv2d, torch.conv3d)
PRODUCTS: tuple[Any, ...] = (F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)


class Sums:
    """Sums over the tokens that one use of a weight has seen; all on the weight's device, in fp32.

    `shape` is the weight's, `[rows, columns]`; of what a block returns, `[channels, 0]`: there are gradients alone then.
    """

    def __init__(self, shape: tuple[int, int], parts: int, is_lookup: bool):
        rows, columns = shape
        self.columns, self.parts, self.is_lookup = columns, parts, is_lookup
        self.width = 1 if is_lookup else columns if columns <= WIDEST else WIDTH
        self.A: Tensor | None = None
        self.rows = torch.zeros(rows)
        self.energies: list[Tensor] = []

    def add_product(self, x: Tensor, grads: Sequence[Tensor]) -> None:
        """`x` `[tokens, parts, columns]` met the weight, and `grads` `[tokens, rows]` came back, one a draw."""
        self.add_inputs(x, self.add_gradients(grads))

    def add_gradients(self, grads: Sequence[Tensor]) -> Tensor:
        """`grads` `[tokens, rows]` came back, one a draw; returns their energy, `[tokens, parts]`."""
        energy = torch.zeros(len(grads[0]), self.parts, device=grads[0].device)
        self.rows = self.rows.to(energy.device)
        for grad in grads:
            squares = grad.square()
            energy += squares.view(len(grad), self.parts, -1).sum(-1)
            self.rows += squares.sum(0)
        self.energies.append(energy.cpu())
        return energy

    def add_inputs(self, x: Tensor, energy: Tensor) -> None:
        """A += sum_t energy_t x_t x_t^T for `x` `[tokens, parts, columns]`, `energy` `[tokens, parts]`."""
        x = (x * energy.to(x.device).sqrt().unsqueeze(-1)).transpose(0, 1)
        if self.width < x.shape[-1]:
            x = F.pad(x, (0, -x.shape[-1] % self.width)).view(x.shape[1], -1, self.width).transpose(0, 1)
        self._add(x.transpose(1, 2) @ x)

    def add_lookups(self, index: Tensor, grads: Sequence[Tensor]) -> None:
        """Entries `index` `[tokens]` were looked up, and `grads` `[tokens, columns]` came back, one a draw."""
        self.rows = self.rows.to(index.device) + torch.bincount(index, minlength=len(self.rows))
        self._add(torch.stack([g.square().sum(0) for g in grads]).sum(0).view(-1, 1, 1))

    def _add(self, A: Tensor) -> None:
        self.A = A if self.A is None else self.A.add_(A)

    def moments(self, labels: int) -> Moments | None:
        """The mean cost over `labels` labels; None where nothing has come by."""
        if self.A is None:
            return None
        rows = self.rows + SMOOTHING if self.is_lookup else self.rows
        shares = rows.view(self.parts, -1)
        shares = shares / shares.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        return Moments(Metric(self.A, self.columns), shares.flatten() / labels)

    def _state(self, whole: bool) -> dict[str, Tensor]:
        found = {"rows": self.rows, "parts": torch.tensor(self.parts)}
        if self.energies:
            found["energies"] = torch.cat(self.energies)
        if self.A is not None and (whole or self.is_lookup):
            found["A"] = self.A
        return found

    @classmethod
    def _from_state(cls, columns: int, state: dict[str, Tensor]) -> Sums:
        sums = cls((len(state["rows"]), columns), int(state["parts"]), "energies" not in state)
        sums.rows, sums.A = state["rows"], state.get("A")
        sums.energies = [state["energies"]] if "energies" in state else []
        return sums


def state_of(uses: Sequence[Sums], whole: bool) -> dict[str, Tensor]:
    """What makes the sums of a weight's uses anew: with A where it is `whole`; else, save of a look-up, without it, for a
    second forward to add the inputs."""
    return {f"{number}.{key}": tensor for number, use in enumerate(uses) for key, tensor in use._state(whole).items()}


def uses_of(columns: int, state: dict[str, Tensor]) -> list[Sums]:
    """The inverse of `state_of`, for a weight of so many columns."""
    parts: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        number, _, key = name.partition(".")
        parts.setdefault(int(number), {})[key] = tensor
    return [Sums._from_state(columns, parts[number]) for number in sorted(parts)]


def share_experts(sums: dict[str, list[Sums]], sites: Sequence[Site]) -> None:
    """Gives every expert of a mixture a few tokens of its layer's average: one that was never reached has a price too."""
    stacked: dict[str, list[Site]] = {}
    for site in sites:
        if site.expert is not None:
            stacked.setdefault(site.parameter, []).append(site)
    for experts in stacked.values():
        reached = [use for site in experts for use in sums.get(site.name, [])]
        tokens = sum(len(energy) for use in reached for energy in use.energies)
        if not tokens:
            continue
        A = torch.stack([use.A for use in reached if use.A is not None]).sum(0) * (PSEUDO_TOKENS / tokens)
        rows = torch.stack([use.rows for use in reached]).sum(0) * (PSEUDO_TOKENS / tokens)
        for site in experts:
            (use, *_) = sums.setdefault(site.name, [Sums(site.shape, 1, False)])
            use.A = A.clone() if use.A is None else use.A + A
            use.rows = use.rows.to(rows.device) + rows


def moments_of(sums: dict[str, list[Sums]], labels: int) -> dict[str, Moments]:
    """Site -> its moments; sites that nothing has come by are left out."""
    found = {name: moments(uses, labels) for name, uses in sums.items()}
    return {name: one for name, one in found.items() if one is not None}


def moments(uses: Sequence[Sums], labels: int) -> Moments | None:
    """The moments of a weight with these uses."""
    found: Moments | None = None
    for use in uses:
        one = use.moments(labels)
        if one is not None:
            found = Moments(one.metric, one.rows, found)
    return found


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
