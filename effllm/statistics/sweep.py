"""One streamed forward over calibration data, and one backward sweep that computes the blocks again.

The forward keeps on disk what each gate (a block, or a weight outside the blocks) was given. The sweep goes from the last
gate to the first: each is computed again, now with gradients, and what its weights saw and what came back at their outputs
is summed. The gradients are those of labels drawn from the model itself, so that their mean square is the Fisher
information, and with it the expected KL of a small error.

A forward is cut at its gates; what lies between them (a final norm, say) is recorded by autograd as usual, so that any
topology that runs forwards also runs backwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from effllm.checkpoint.tensors import read_tensors, write_tensors
from effllm.errors import EffllmError
from effllm.progress import track
from effllm.site import Site, is_experts
from effllm.source import Batch, Source, evaluating
from effllm.source.lockstep import Call
from effllm.statistics.head import counted, head_logits, logits_at_once, logits_of, positions, sites_behind
from effllm.statistics.spool import Spool
from effllm.statistics.sums import Sums, state_of, uses_of
from effllm.statistics.tap import Tap

DRAWS = 2  # labels of every token
HEAD = "head"  # the name under which weights behind the base model come
TIED = "tied"  # and weights that several modules use


@dataclass
class _Leaf:
    """A tensor that a gate returned: the gradients that reach it, one a draw, and where its value is kept."""

    grads: dict[int, Tensor] = field(default_factory=dict)
    file: Path | None = None

    def add(self, draw: int, grad: Tensor) -> None:
        self.grads[draw] = self.grads[draw] + grad if draw in self.grads else grad


@dataclass
class _Input:
    """A tensor given to a gate that depends on another gate's output: it is that itself, or was computed from it."""

    file: Path
    leaf: _Leaf | None
    computed: Tensor | None


@dataclass
class _Passing:
    """One call of a gate, kept to be made again: flattened arguments with an `_Input` where a gradient flows back."""

    arguments: list[Any]
    spec: Any
    leaves: list[_Leaf | None]
    """Of the flattened outputs."""


Arrivals = list[tuple[str, list[_Passing]]]


class Sweep:
    """The forward and the backward; `run` carries them out once.

    Args:
        source: the model, computed in the dtype in which its weights become resident.
        batches: model inputs by name.
        spool: a folder for hidden states and, from one gate to the next, the gradients that a killed sweep goes on with.
        seed: of the labels.
    """

    def __init__(self, source: Source, batches: Sequence[Batch], spool: Path, seed: int = 0):
        self.source, self.batches, self.seed = source, batches, seed
        self.spool = Spool(spool)
        self.tokens = 0
        """Labels drawn for one draw: sums are divided by them, and by the draws."""
        self._draw = 0
        self._leaves: list[_Leaf] = []
        self._tied: dict[str, list[Sums]] = {}

    def run(self, done: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, list[Sums]]]]:
        """Yields (gate, site -> sums of each use) from the last gate to the first, the gate's weights resident.

        Gates in `done` were yielded by an earlier sweep over the same spool, and are left out. The first gate is `HEAD`,
        for weights behind the base model; the last is `TIED`, for weights that several modules use.

        Raises:
            UsageError: the model returns no logits.
            EffllmError: a gate returns NaN or inf (named), or there is nothing but padding.
        """
        model, behind = self.source.model, sites_behind(self.source)
        with _frozen(model), evaluating(model):
            results: list[Any] = []
            arrivals = self._forward(results, whole=not behind)
            if done:
                self._resume(len(done))
            elif behind:
                with self.source.resident(*self.source.units_of(behind)), self._in_half(behind):
                    tap = Tap(model, behind)
                    for number in track(range(len(results)), "statistics: head", total=len(results)):
                        self._head(number, results, tap)
                    sums = self._sums(tap)
                    self._save(1)
                    yield HEAD, sums
            else:
                for number in range(len(results)):
                    self._draw_labels(number, results)
                self._save(1)
                yield HEAD, {}
            if not self.tokens:
                raise EffllmError("the calibration data are nothing but padding; check the attention mask")
            results.clear()
            yield from self._backward(arrivals, done)
            tied = [site for site in self.source.sites if site.name in self._tied]
            with self.source.resident(*self.source.units_of(tied)):
                yield TIED, self._tied

    def _in_half(self, sites: Sequence[Site]) -> contextlib.AbstractContextManager[None]:
        """Weights in the dtype in which they are multiplied: a large head would be cast for every few tokens."""
        half = self.source.quick_dtype
        names = {site.parameter for site in sites} if half else set()
        return self.source.changed({name: self.source.model.get_parameter(name).to(half) for name in names}, cast=False)

    def _forward(self, results: list[Any], whole: bool) -> Arrivals:
        """Each arrival at a gate, in order, with its passings."""
        outside = [name for site in self.source.sites if site.block is None for name in (site.name, *site.tied)]
        walked = set((self.source.model if whole else self.source.base).modules())
        gates = [name for name in outside if self.source.model.get_submodule(name) in walked]
        walk = self.source.walk(self.batches, gates, grad=True, results=results, whole=whole)
        arrivals: Arrivals = []
        with self.source.quickly():
            for gate, calls in track(walk, "statistics: forward"):
                before = self.spool.nbytes
                arrivals.append((gate, [self._pass(gate, call) for call in calls]))
                if self.spool.nbytes and not before:  # the first hidden states: those of all other blocks are as many
                    self.spool.require(self.spool.nbytes * (len(self.source.blocks) - 1))
        return arrivals

    def _pass(self, gate: str, call: Call) -> _Passing:
        call.run()
        flat, spec = tree_flatten((call.args, call.kwargs))
        arguments = [self._keep(value) for value in flat]
        outputs, shape = tree_flatten(call.output)
        leaves: list[_Leaf | None] = [None] * len(outputs)
        for place, value in enumerate(outputs):
            if isinstance(value, Tensor) and value.is_floating_point():
                if not torch.isfinite(value).all():
                    raise EffllmError(
                        f"{gate} returns NaN or inf on the calibration data; try --dtype float32, or other data"
                    )
                outputs[place], leaves[place] = self._cut(value)
        call.output = tree_unflatten(outputs, shape)
        return _Passing(arguments, spec, leaves)

    def _keep(self, value: Any) -> Any:
        """An argument as a passing keeps it: on disk, where a gradient flows back through it."""
        if not (isinstance(value, Tensor) and value.requires_grad):
            return value
        leaf, version = getattr(value, "effllm_leaf", (None, 0))
        if leaf is None or version != value._version:
            return _Input(self.spool.write(value), None, value)
        leaf.file = leaf.file or self.spool.write(value)
        return _Input(leaf.file, leaf, None)

    def _cut(self, value: Tensor) -> tuple[Tensor, _Leaf]:
        """A tensor of the same values behind which autograd ends, and the record to which its gradients go."""
        leaf, end = _Leaf(), value.detach().requires_grad_()

        def receive(ended: Tensor) -> None:
            if ended.grad is not None:
                leaf.add(self._draw, ended.grad)
                ended.grad = None

        end.register_post_accumulate_grad_hook(receive)
        tensor = end.clone()  # which the model may change in place
        tensor.effllm_leaf = leaf, tensor._version  # type: ignore[attr-defined]
        self._leaves.append(leaf)
        return tensor, leaf

    def _head(self, number: int, results: list[Any], tap: Tap) -> None:
        """Sends the gradients of drawn labels back through what lies behind the base model, a few tokens at a time."""
        source, result = self.source, results[number]
        batch, hidden, results[number] = self.batches[number], result.last_hidden_state, None
        states, mask = hidden.detach().flatten(0, 1), counted(batch, hidden.shape[:2])
        grads = [torch.zeros_like(states) for _ in range(DRAWS)]
        step = logits_at_once(source.model)
        for start in range(0, len(states), step):
            part = slice(start, start + step)
            given = states[part].unsqueeze(0).requires_grad_()
            with torch.enable_grad(), source.quickly(), tap:
                logits = head_logits(source, batch, type(result), given)
            for draw, label in enumerate(self._labels(logits, mask[part], number, start)):
                grads[draw][part] = torch.autograd.grad(logits, given, label, retain_graph=draw < DRAWS - 1)[0][0]
            tap.flush()
        for draw, grad in enumerate(grads):
            self._draw = draw
            torch.autograd.backward(hidden, grad.view_as(hidden), retain_graph=draw < DRAWS - 1)

    def _draw_labels(self, number: int, results: list[Any]) -> None:
        """The same for a model that ran as a whole."""
        logits, results[number] = logits_of(results[number]), None
        mask = counted(self.batches[number], logits.shape[:-1])
        for draw, label in enumerate(self._labels(logits, mask, number, 0)):
            self._draw = draw
            torch.autograd.backward(logits, label, retain_graph=draw < DRAWS - 1)

    def _labels(self, logits: Tensor, mask: Tensor, *place: int) -> Iterator[Tensor]:
        """For each draw, the gradient of the loss of labels drawn from `logits`; zero at padding."""
        chances = logits.detach().float().softmax(-1).flatten(0, -2)
        generator = torch.Generator(chances.device).manual_seed(hash((self.seed, *place)) % 2**63)
        drawn = torch.multinomial(chances, DRAWS, replacement=True, generator=generator)
        mask = mask.to(chances.device).unsqueeze(1)
        self.tokens += int(mask.sum())
        chances, one = chances.mul_(mask).to(logits.dtype), mask.to(logits.dtype)
        for draw in range(DRAWS):
            yield chances.scatter_add(1, drawn[:, draw : draw + 1], -one).view_as(logits)

    def _backward(self, arrivals: Arrivals, done: Sequence[str]) -> Iterator[tuple[str, dict[str, list[Sums]]]]:
        first = {gate: number for number, (gate, _) in reversed(list(enumerate(arrivals)))}
        sums: dict[str, dict[str, list[Sums]]] = {}
        processed = len(done) or 1
        for number in track(range(len(arrivals) - 1, -1, -1), "statistics: backward", total=len(arrivals)):
            gate, passings = arrivals[number]
            if gate in done:
                continue
            with self.source.resident_at(gate):
                tap = Tap(self.source.model, self._sites_at(gate), sums.setdefault(gate, {}))
                for place in range(len(passings)):
                    self._pass_back(gate, passings[place], tap)
                    passings[place].arguments.clear()
                if first[gate] == number:
                    processed += 1
                    own = self._sums(tap)
                    self._save(processed)
                    yield gate, own

    def _sites_at(self, gate: str) -> list[Site]:
        inside = [site for site in self.source.sites if site.block == gate]
        return inside or [site for site in self.source.sites if gate in (site.name, *site.tied)]

    def _sums(self, tap: Tap) -> dict[str, list[Sums]]:
        """What a tap has summed, less what is used elsewhere too: that is kept until all uses are known."""
        tied = {site.name for site in self.source.sites if site.tied}
        for name in tap.sums.keys() & tied:
            self._tied.setdefault(name, []).extend(tap.sums[name])
        return {name: uses for name, uses in tap.sums.items() if name not in tied}

    def _pass_back(self, gate: str, passing: _Passing, tap: Tap) -> None:
        """Makes a call of a gate again and sends the gradients of its outputs back through it."""
        module, arguments = self.source.model.get_submodule(gate), list(passing.arguments)
        inputs = [(place, value) for place, value in enumerate(arguments) if isinstance(value, _Input)]
        for place, value in inputs:
            arguments[place] = self.spool.read(value.file, self.source.device).requires_grad_()
        args, kwargs = tree_unflatten(arguments, passing.spec)
        with torch.enable_grad(), self.source.quickly(), experts_one_by_one(module), tap:
            outputs, _ = tree_flatten(module(*args, **kwargs))
        pairs = [(out, leaf) for out, leaf in zip(outputs, passing.leaves, strict=True) if leaf and out.requires_grad]
        for draw in range(DRAWS):
            self._draw = draw
            live = [(out, leaf.grads[draw]) for out, leaf in pairs if draw in leaf.grads]
            if live:
                torch.autograd.backward(
                    [out for out, _ in live], [grad for _, grad in live], retain_graph=draw < DRAWS - 1
                )
            for place, value in inputs:
                grad, arguments[place].grad = arguments[place].grad, None
                if grad is not None and value.leaf is not None:
                    value.leaf.add(draw, grad)
                elif grad is not None and value.computed is not None:
                    torch.autograd.backward(value.computed, grad, retain_graph=True)
        tap.flush()
        if gate in self.source.blocks and passing.leaves[0] is not None:
            self._hear_output(gate, passing.leaves[0], tap)
        for _, leaf in pairs:
            leaf.grads.clear()

    def _hear_output(self, gate: str, leaf: _Leaf, tap: Tap) -> None:
        """Sums the gradients at the first tensor that a block returns, under the block's name."""
        grads = [positions(grad).float() for grad in leaf.grads.values()]
        if grads:
            (use,) = tap.sums.setdefault(gate, [Sums((grads[0].shape[1], 0), 1, False)])
            use.add_gradients(grads)

    def _save(self, processed: int) -> None:
        """Writes what a sweep needs that goes on behind the gates processed so far; the state before stays beside it."""
        state = {f"leaf.{n}.{d}": g for n, leaf in enumerate(self._leaves) for d, g in leaf.grads.items()}
        for name, uses in self._tied.items():
            state |= {f"tied.{name}.{key}": tensor for key, tensor in state_of(uses, whole=True).items()}
        write_tensors(self._state(processed), {**state, "tokens": torch.tensor(self.tokens)})
        self._state(processed - 2).unlink(missing_ok=True)

    def _state(self, processed: int) -> Path:
        return self.spool.folder / f"state-{processed}.safetensors"

    def _resume(self, processed: int) -> None:
        state = read_tensors(self._state(processed), self.source.device)
        self.tokens = int(state.pop("tokens"))
        tied: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            kind, _, rest = key.partition(".")
            if kind == "leaf":
                number, draw = map(int, rest.split("."))
                self._leaves[number].add(draw, tensor)
            else:
                name, number_of_use, part = rest.rsplit(".", 2)
                tied.setdefault(name, {})[f"{number_of_use}.{part}"] = tensor
        sites = {site.name: site for site in self.source.sites}
        self._tied = {name: uses_of(sites[name].shape[1], parts) for name, parts in tied.items()}


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes a gradient, so that autograd records no more than the way from outputs to inputs."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def experts_one_by_one(block: nn.Module) -> Iterator[None]:
    """Experts of a mixture run their class's own loop, which multiplies by one expert's matrix at a time."""
    loops = {module: getattr(type(module).forward, "__wrapped__", None) for module in block.modules()}
    experts = [module for module, loop in loops.items() if loop is not None and is_experts(module)]
    for module in experts:
        module.forward = partial(cast(Any, loops[module]), module)
    try:
        yield
    finally:
        for module in experts:
            del module.forward
