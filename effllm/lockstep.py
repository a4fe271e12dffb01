"""Several forwards of one model, all of them at the same module at a time.

A forward a batch runs in a thread of its own and waits where it reaches one of the gates (a block, say). When all wait,
the gate's weights are loaded once and the forwards pass it one after the other. So any model is walked block by block
through its own code: stacks in call order, each call with the arguments that the model makes, whatever lies between.
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
class _Forward:
    """One forward in its thread. Either it runs or its owner does, never both."""

    work: Callable[[], Any]
    at: str | None = None
    """The gate where it waits; None once it has ended."""
    passed: tuple[Tensor, Tensor] | None = None
    """Input and output of the gate that it passed last."""
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

    def wait_at(self, gate: str) -> None:
        """Called in its own thread: hands over until it is resumed."""
        self.at = gate
        self.done.release()
        self.turn.acquire()
        if self.cancelled:
            raise _Cancelled

    def _wait(self) -> None:
        self.done.acquire()
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        _running.forward = self
        try:
            with torch.no_grad():
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
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Runs `forwards` (calls of `model` or a part of it), stopping at the submodules `gates`.

    Yields (gate, input, output) for each passing: the first tensor that the module was given, and the first it returned.
    `resident(gate)` is open while forwards pass `gate`.
    """
    modules = {gate: model.get_submodule(gate) for gate in gates}
    own = {gate: module.__dict__.get("forward") for gate, module in modules.items()}
    running: list[_Forward] = []
    try:
        for gate, module in modules.items():
            module.forward = _gated(gate, module.forward)
        for work in forwards:
            running.append(_Forward(work))
            running[-1].start()
        while waiting := [forward for forward in running if forward.at]:
            gate = str(waiting[0].at)
            with resident(gate):
                for forward in waiting:
                    if forward.at == gate:
                        forward.resume()
                        assert forward.passed is not None
                        yield gate, *forward.passed
                        forward.passed = None
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
        current: _Forward = _running.forward
        current.wait_at(gate)
        out = original(*args, **kwargs)
        given = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        current.passed = given, out[0] if isinstance(out, tuple) else out
        return out

    return forward
