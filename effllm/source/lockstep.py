"""Several forwards of one model, all of them at the same module at a time.

A forward a batch runs in a thread of its own and waits where it reaches one of the gates (a block, say). When all wait,
the gate's weights are loaded once, and who walks decides what each call returns; then the forwards go on one after the
other. So any model is walked block by block through its own code: stacks in call order, each call with the arguments that
the model makes, whatever lies between.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


class _Cancelled(Exception):
    """Unwinds a forward that nobody waits for any more."""


@dataclass
class Call:
    """A forward's call of a gate. The forward goes on with `output`, which is the gate's own unless it is set before."""

    number: int
    """Which of the forwards calls."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    forward: Callable[..., Any]
    """The gate's own forward."""
    output: Any = None

    @property
    def given(self) -> Tensor:
        """The first tensor of the arguments."""
        return next(value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor))

    @property
    def returned(self) -> Tensor:
        """The output, or the first of several."""
        first: Tensor = self.output[0] if isinstance(self.output, tuple) else self.output
        return first

    @torch.no_grad()
    def run(self) -> None:
        """Lets the gate compute `output`."""
        self.output = self.forward(*self.args, **self.kwargs)


@dataclass
class _Forward:
    """One forward in its thread. Either it runs or its owner does, never both."""

    number: int
    work: Callable[[], Any]
    grad: bool
    cast: torch.dtype | None
    """What its products are cast to on a CPU, as in the thread that walks."""
    at: str | None = None
    """The gate where it waits; None once it has ended."""
    call: Call | None = None
    """The call for which it waits."""
    error: BaseException | None = None
    cancelled: bool = False
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    done: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def start(self) -> None:
        """Runs until the first gate."""
        threading.Thread(target=self._run, daemon=True).start()
        self._wait()

    def resume(self) -> None:
        """Passes the gate and runs until the next one."""
        self.turn.release()
        self._wait()

    def cancel(self) -> None:
        """Ends it where it waits."""
        self.cancelled = True
        self.turn.release()
        self.done.acquire()

    def wait_at(self, gate: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called in its own thread: hands over until it is resumed, and returns what the call gave."""
        call = self.call = Call(self.number, args, kwargs, forward)
        del args, kwargs
        self.at = gate
        self.done.release()
        self.turn.acquire()
        if self.cancelled:
            raise _Cancelled
        if call.output is None:
            call.run()
        self.call, output = None, call.output
        call.args, call.kwargs, call.output = (), {}, None  # who walked may still hold the call
        return output

    def _wait(self) -> None:
        self.done.acquire()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        _running.forward = self
        try:
            with torch.set_grad_enabled(self.grad), torch.autocast("cpu", self.cast, self.cast is not None):
                self.work()
        except _Cancelled:
            pass
        except BaseException as error:  # raised again in the owner's thread
            self.error = error
        finally:
            self.at = None
            self.done.release()


_running = threading.local()


def lockstep(
    model: nn.Module,
    gates: list[str],
    forwards: Sequence[Callable[[], Any]],
    resident: Callable[[str], AbstractContextManager[None]],
    grad: bool = False,
) -> Iterator[tuple[str, list[Call]]]:
    """Runs `forwards` (calls of `model` or a part of it), stopping at the submodules `gates`.

    Yields (gate, its calls, in the order of the forwards) for each time that forwards arrive. `resident(gate)` is open
    until the next one is asked for. With `grad`, what lies between the gates is recorded for a backward.
    """
    modules = {gate: model.get_submodule(gate) for gate in gates}
    own = {gate: module.__dict__.get("forward") for gate, module in modules.items()}
    running: list[_Forward] = []
    try:
        for gate, module in modules.items():
            module.forward = _gated(gate, module.forward)
        for number, work in enumerate(forwards):
            cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
            running.append(_Forward(number, work, grad, cast))
            running[-1].start()
        while waiting := [forward for forward in running if forward.at]:
            gate = str(waiting[0].at)
            arrived = [forward for forward in waiting if forward.at == gate]
            with resident(gate):
                yield gate, [forward.call for forward in arrived if forward.call]
                for forward in arrived:
                    forward.resume()
    finally:
        for forward in running:
            if forward.at:
                forward.cancel()
        for gate, module in modules.items():
            del module.forward
            if own[gate] is not None:
                module.__dict__["forward"] = own[gate]


def _gated(gate: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        current: _Forward | None = getattr(_running, "forward", None)
        if current is None:  # who walks calls the gate itself
            return original(*args, **kwargs)
        return current.wait_at(gate, original, args, kwargs)

    return forward
