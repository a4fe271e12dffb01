"""The state of one forward: which tokens are left. It travels with the call; what the KV cache holds stays on the cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effllm.errors import EffllmError
from effllm.methods.pyramiddrop.ranking import take

if TYPE_CHECKING:
    from effllm.methods.pyramiddrop.hooks import VisualStream


@dataclass
class Call:
    """One forward of the whole model: what only its own arguments tell."""

    owner: VisualStream
    outer: Call | None
    visual: Tensor | None = None
    labels: Tensor | None = None
    mask: Any = None
    tail: int = 0
    """How many last positions have their logits asked for: all but the first of them may be guesses at an answer."""


@dataclass
class Kept:
    """What a KV cache holds: `slots[stage]` `[batch, keys]`, the position of every key in the whole text, -1 a filler."""

    schedule: dict[int, float]
    slots: dict[int, Tensor]
    covered: int
    """Tokens that `slots` account for; those after them were all kept."""
    plain: bool
    """Whether no key is a filler or padding, so that a later token may see them all."""

    def cut(self, length: int) -> Kept:
        """The same for a cache of which only the first `length` tokens are left."""
        gone = self.covered - length
        if any(bool((keys[:, -gone:] < length).any()) for keys in self.slots.values()):
            raise EffllmError(
                "the KV cache was cut where PyramidDrop had dropped tokens, and its layers no longer hold the same text: "
                "start again from an empty cache"
            )
        slots = {stage: keys[:, :-gone] for stage, keys in self.slots.items()}
        return Kept(self.schedule, slots, length, self.plain)


@dataclass
class Stream:
    """One forward of the decoder: which tokens are left, and what later layers must be told."""

    call: Call
    real: Tensor
    """`[batch, tokens]`: not padding."""
    past: int
    """Tokens before this forward, dropped ones included."""
    old: Kept | None
    counts: list[int]
    """Visual tokens of each row."""
    form: Any
    """The function that made the masks."""
    stage: int = 0
    left: Tensor | None = None
    """Positions `[batch, tokens left]` within this forward, ascending, -1 a filler on the left; None while all are left."""
    stages: dict[int, Tensor | None] = field(default_factory=dict)
    lefts: list[Tensor | None] = field(default_factory=list)
    """`left` of each layer."""
    previous: Tensor | None = None
    memo: dict[tuple[int, str, int], Any] = field(default_factory=dict)

    def before(self, stage: int) -> Tensor:
        """Positions `[batch, keys]` of the keys that layers of `stage` hold from earlier forwards."""
        past = torch.arange(self.past, device=self.real.device).expand(len(self.real), -1)
        slots = self.old.slots.get(stage) if self.old is not None else None
        if slots is None or self.old is None:
            return past
        return torch.cat([slots.expand(len(self.real), -1), past[:, self.old.covered :]], dim=1)

    def keys(self, stage: int) -> Tensor | None:
        """Positions `[batch, keys]` in the whole text of what layers of `stage` attend to; None where it is all of it."""
        if self.left is None and (self.old is None or stage not in self.old.slots):
            return None
        now = self.places()
        return torch.cat([self.before(stage), torch.where(now < 0, now, now + self.past)], dim=1)

    def places(self) -> Tensor:
        """`left`, also where all are left."""
        if self.left is not None:
            return self.left
        return torch.arange(self.real.shape[1], device=self.real.device).expand(len(self.real), -1)

    def texts(self, places: Tensor) -> Tensor:
        """Which `places` `[batch, n]` of the whole text are neither fillers nor padding."""
        real = places >= 0
        return real if self.call.mask is None else real & take(self.call.mask, places).bool()

    def dropped(self, stage: int) -> Tensor | int:
        """How many tokens of each row were dropped before those of this forward, `[batch, 1]`."""
        if self.old is None or stage not in self.old.slots:
            return 0
        all_ = torch.arange(self.old.covered, device=self.real.device).expand(len(self.real), -1)
        slots = self.old.slots[stage].expand(len(self.real), -1)
        return self.texts(all_).sum(1, keepdim=True) - self.texts(slots).sum(1, keepdim=True)

    def queries(self) -> Tensor:
        """`[batch, tokens]`: the last token of the prompt, or with labels the token before each answer."""
        if self.call.labels is not None:
            answer = self.call.labels != -100
            first = torch.zeros_like(answer)
            first[:, :-1] = answer[:, 1:] & ~answer[:, :-1]
            return first
        places = torch.arange(self.real.shape[1], device=self.real.device)
        last = torch.where(self.real, places, -1).amax(1, keepdim=True)
        asked = max(0, len(places) - (self.call.tail or 1))
        return places == torch.where(self.real[:, asked : asked + 1], last.clamp_max(asked), last)

    def kept(self, schedule: dict[int, float]) -> Kept | None:
        """What the KV cache holds after this forward."""
        slots = {}
        for stage, left in self.stages.items():
            self.left = left
            keys = self.keys(stage)
            if keys is not None:
                slots[stage] = keys
        plain = (self.call.mask is None or bool(self.call.mask.all())) and all(
            bool((x >= 0).all()) for x in slots.values()
        )
        return Kept(schedule, slots, self.past + self.real.shape[1], plain) if slots else None
