"""The training loop: what compression has changed in the output of a block is learnt back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from effllm.layers.placing import Members, Stored, decode_stored, encode
from effllm.method import Codec, Learnable
from effllm.site import Site
from effllm.source import evaluating
from effllm.statistics.again import Seen
from effllm.statistics.sweep import positions

logger = logging.getLogger(__name__)
STEPS = 100
HELD_OUT = 8  # one of so many examples is not learnt from: they tell whether what was learnt is kept
Loss = Callable[[int], Tensor]
"""The loss of an example."""


def learn(
    module: nn.Module, rates: Mapping[str, float], loss: Loss, examples: int, steps: int = STEPS, seed: int = 0
) -> tuple[float, float]:
    """Trains parameters of `module` by Adam, at a rate that falls to zero; the held-out loss before and after.

    `rates` says of each parameter how far it may go over all steps. Where the held-out loss has not fallen, all parameters
    are what they were.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(examples, generator=generator).tolist()
    held = order[: -(-examples // HELD_OUT)]
    seen = order[len(held) :] or held
    parameters = {name: module.get_parameter(name) for name in rates}
    first = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    groups = [{"params": [parameters[name]], "lr": 2 * rate / steps} for name, rate in rates.items()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
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
        for name, parameter in parameters.items():
            parameter.copy_(first[name])
    return before, before


@torch.no_grad()
def _mean(loss: Loss, examples: Sequence[int]) -> float:
    return sum(float(loss(example)) for example in examples) / len(examples)


def encode_unit(model: nn.Module, members: Mapping[str, Members], seen: Seen | None) -> dict[str, Stored]:
    """What is stored for the parameters of a unit (`members`, from `by_parameter`), with what came by there, if anything.

    Raises:
        EffllmError: a weight holds NaN or inf.
    """
    stored = {name: encode(model, codecs, seen.moments if seen else {}) for name, codecs in members.items()}
    return learn_block(seen, members, stored) if seen is not None and seen.examples else stored


def learn_block(
    seen: Seen, members: Mapping[str, Members], stored: dict[str, Stored], steps: int = STEPS
) -> dict[str, Stored]:
    """What is stored for the parameters of a block, learnt so that the block returns what it should.

    The loss is the expected KL of the error in the block's output, nats per token: 1/2 sum_t g_t sum_c r_c e_tc^2, with the
    gradients' energy g_t of a token and the share r_c of a channel. Learnt are rounding and ranges, or whatever a codec's
    `learnable` offers, of all weights together. (After BRECQ, Li et al., arXiv 2102.05426, section 3.3.)
    """
    module = seen.model.get_submodule(seen.unit)
    learnt = _Block(seen.model, seen.unit, members, stored)
    rates, channels = learnt.rates(), seen.channels
    if not rates or channels is None:
        return stored

    def loss(number: int) -> Tensor:
        example = seen.examples[number]
        output = functional_call(module, learnt.weights(), example.args, example.kwargs)
        squares = (positions(output[0] if isinstance(output, tuple) else output) - example.target).float().square()
        return 0.5 * (squares @ channels.to(squares.device) * example.cost.to(squares.device)).sum() / len(squares)

    with evaluating(module), torch.enable_grad():
        before, after = learn(learnt, rates, loss, len(seen.examples), steps)
    logger.info("%s: expected KL of its output %.5f, learnt %.5f", seen.unit, before, after)
    return learnt.stored()


class _Block(nn.Module):
    """The stored weights of a block while they are learnt; `members` and `stored` as `by_parameter` and `encode` give."""

    def __init__(self, model: nn.Module, block: str, members: Mapping[str, Members], stored: Mapping[str, Stored]):
        super().__init__()
        self._model, self._prefix, self._given = [model], f"{block}.", stored
        self._dense = {name: decode_stored(model, members[name], stored[name]) for name in members}
        self._places: list[tuple[str, Codec, int, Site]] = []
        self.learnt = nn.ModuleList()
        for name, codecs in members.items():
            for codec, sites in codecs.items():
                for number, site in enumerate(sites):
                    one = codec.learnable(_of(stored[name][codec], site, number), site.shape)
                    if one is not None:
                        self.learnt.append(one)
                        self._places.append((name, codec, number, site))

    def rates(self) -> dict[str, float]:
        """Of every parameter, how far it may go."""
        found = enumerate(self.learnt)
        return {f"learnt.{n}.{key}": rate for n, one in found for key, rate in cast(Learnable, one).rates().items()}

    def weights(self) -> dict[str, Tensor]:
        """The parameters of the block, by their names in it, as they are decoded."""
        (model,) = self._model
        found = dict(self._dense)
        experts: dict[str, list[Tensor]] = {}
        for one, (name, _, _, site) in zip(self.learnt, self._places, strict=True):
            matrix = site.arrange(one(), model).to(found[name].dtype)
            if site.expert is None:
                found[name] = matrix
            else:
                experts.setdefault(name, list(found[name].unbind()))[site.expert] = matrix
        found |= {name: torch.stack(matrices) for name, matrices in experts.items()}
        return {name.removeprefix(self._prefix): tensor for name, tensor in found.items()}

    def stored(self) -> dict[str, Stored]:
        """What is stored now, as it was given."""
        found = {name: dict(codecs) for name, codecs in self._given.items()}
        for one, (name, codec, number, site) in zip(self.learnt, self._places, strict=True):
            data = cast(Learnable, one).stored()
            if site.expert is not None:
                place = torch.tensor([number], device=next(iter(data.values())).device)
                stacked = found[name][codec].items()
                data = {key: tensor.index_copy(0, place, data[key].unsqueeze(0)) for key, tensor in stacked}
            found[name][codec] = data
        return found


def _of(data: dict[str, Tensor], site: Site, number: int) -> dict[str, Tensor]:
    return data if site.expert is None else {key: tensor[number] for key, tensor in data.items()}
