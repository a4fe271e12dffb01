"""The training loop: what compression has changed in the output of a block is learnt back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from effllm.layers.placing import Members, Stored, decode_stored, encode
from effllm.method import Codec
from effllm.source import evaluating
from effllm.statistics.again import Seen
from effllm.statistics.head import positions

logger = logging.getLogger(__name__)
STEPS = 100
RATE = 0.2
HELD_OUT = 8  # one of so many examples is not learnt from: they tell whether what was learnt is kept
Loss = Callable[[int], Tensor]
"""The loss of an example."""


def learn(
    parameters: Sequence[nn.Parameter], loss: Loss, examples: int, rate: float = RATE, steps: int = STEPS, seed: int = 0
) -> tuple[float, float]:
    """Trains `parameters` by Adam, at a rate that falls to zero; returns the held-out loss before and after.

    `rate` is how far a parameter may go over all steps. Where the held-out loss has not fallen, all are what they were.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(examples, generator=generator).tolist()
    held = order[: -(-examples // HELD_OUT)]
    seen = order[len(held) :] or held
    first = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, 2 * rate / steps, betas=(0.9, 0.95))
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    before = _mean(loss, held)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(seen[int(torch.randint(len(seen), (), generator=generator))]).backward()
        optimizer.step()
        falling.step()
    after = _mean(loss, held)
    if after < before:
        return before, after
    with torch.no_grad():
        for parameter, value in zip(parameters, first, strict=True):
            parameter.copy_(value)
    return before, before


@torch.no_grad()
def _mean(loss: Loss, examples: Sequence[int]) -> float:
    return sum(float(loss(example)) for example in examples) / len(examples)


def encode_unit(model: nn.Module, members: Mapping[str, Members], seen: Seen | None) -> dict[str, Stored]:
    """What is stored for the parameters of a unit (`members`, from `by_parameter`), with what came by there, if anything.

    Raises:
        EffllmError: a weight holds NaN or inf.
    """
    found, stored = seen.moments if seen is not None else {}, {}
    for name, codecs in members.items():
        stored[name] = encode(model, codecs, found)
        for sites in codecs.values():
            for site in sites:
                found.pop(site.name, None)  # as large as a matrix, and used once
    return learn_block(seen, members, stored) if seen is not None and seen.examples else stored


def learn_block(seen: Seen, members: Mapping[str, Members], stored: dict[str, Stored]) -> dict[str, Stored]:
    """What is stored for the parameters of a block, learnt so that the block returns what it should.

    The loss is the expected KL of the error in the block's output, nats per token: 1/2 sum_t g_t sum_c r_c e_tc^2, with the
    gradients' energy g_t of a token and the share r_c of a channel. Learnt is what codecs declare `trainable`, of all
    weights together. (Blocks are the units of BRECQ, Li et al., arXiv 2102.05426, section 3.3. Rounding is not learnt: from
    codes that are solved in the metric, gradients straight through it found nothing better.)
    """
    learnt, channels = _Learnt(seen, members, stored), seen.channels
    if not learnt.parameters or channels is None:
        return stored

    def loss(number: int) -> Tensor:
        example = seen.examples[number]
        output = functional_call(module, learnt.weights(), example.args, example.kwargs)
        squares = (positions(output[0] if isinstance(output, tuple) else output) - example.target).float().square()
        costs = (squares * channels.to(squares.device)).sum(1) * example.cost.to(squares.device)
        return 0.5 * costs.mean()

    module = seen.source.model.get_submodule(seen.unit)
    with evaluating(module), torch.enable_grad(), seen.source.quickly():
        before, after = learn(learnt.parameters, loss, len(seen.examples), steps=STEPS)
    logger.info("%s: expected KL of its output %.5f, learnt %.5f", seen.unit, before, after)
    return learnt.stored()


class _Learnt:
    """The stored weights of a block while they are learnt; `members` and `stored` as `by_parameter` and `encode` give.

    A parameter is a change of a stored tensor, in units of the mean size of its row.
    """

    def __init__(self, seen: Seen, members: Mapping[str, Members], stored: Mapping[str, Stored]):
        self._seen, self._members, self._given = seen, members, stored
        self._changes: dict[tuple[str, Codec, str], nn.Parameter] = {}
        self._dense: dict[str, Tensor] = {}
        for name, codecs in members.items():
            for codec in codecs:
                for key in codec.trainable:
                    self._changes[name, codec, key] = nn.Parameter(
                        torch.zeros_like(stored[name][codec][key], dtype=torch.float32)
                    )
            if not any(codec.trainable for codec in codecs):
                self._dense[name] = decode_stored(seen.source.model, codecs, stored[name])
        self.parameters = list(self._changes.values())

    def weights(self) -> dict[str, Tensor]:
        """The parameters of the block, by their names in it, as they are decoded."""
        changed = {
            name: decode_stored(self._seen.source.model, self._members[name], now) for name, now in self._now().items()
        }
        return {name.removeprefix(f"{self._seen.unit}."): tensor for name, tensor in (self._dense | changed).items()}

    @torch.no_grad()
    def stored(self) -> dict[str, Stored]:
        """What is stored now."""
        found = dict(self._given)
        for name, now in self._now().items():
            first = self._given[name]
            found[name] = {
                codec: {key: t.to(first[codec][key].dtype) for key, t in d.items()} for codec, d in now.items()
            }
        return found

    def _now(self) -> dict[str, Stored]:
        """The stored tensors of parameters that change, in fp32 where they do."""
        found = {name: {codec: dict(data) for codec, data in self._given[name].items()} for name, *_ in self._changes}
        for (name, codec, key), change in self._changes.items():
            first = found[name][codec][key].float()
            found[name][codec][key] = first + change * first.abs().mean(-1, keepdim=True)
        return found
