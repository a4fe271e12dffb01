"""Edits of a live model: put on, and taken off again without a trace."""

from __future__ import annotations

from types import TracebackType

from torch import nn

from effllm.method import Edit


class Handle:
    """An edit that is on a model. `remove` restores the model exactly; as a context manager, leaving it does."""

    def __init__(self, model: nn.Module, edit: Edit):
        self.model, self.edit, self.on = model, edit, True
        edit.attach(model)

    def remove(self) -> None:
        """Takes the edit off; a second time it does nothing."""
        if self.on:
            self.edit.detach(self.model)
        self.on = False

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def apply(model: nn.Module, edit: Edit) -> Handle:
    """Puts `edit` on a live model.

    Raises:
        EffllmError: the edit cannot act on this model; the message says why.
    """
    return Handle(model, edit)
