"""What is summed of calibration tokens at each use of a weight, and the moments that come of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from effllm.moments import Metric, Moments
from effllm.site import Site

WIDEST = 16384  # columns; above, the metric is block-diagonal
WIDTH = 1024  # of those blocks
PSEUDO_TOKENS = 32  # of its layer's average, that an expert is given
SMOOTHING = 1.0  # look-ups that every entry of an embedding is given beside those counted


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
