"""Edits of a model: on a live one, taken off again without a trace; and of the structure of one that is on disk."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import nn

from effllm.checkpoint import Checkpoint, StoredTensor, read_header
from effllm.checkpoint.tensors import write_tensors
from effllm.data.caching import cache_folder
from effllm.data.inputs import data_key, folder_batches
from effllm.errors import EffllmError
from effllm.hf import EffllmConfig
from effllm.journal import edit_entries, edits_in
from effllm.method import Edit
from effllm.plans import Calibration
from effllm.registry import from_spec
from effllm.resume import RunJournal
from effllm.source import Batch, LiveModel, StoredModel

logger = logging.getLogger(__name__)


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


def apply(model: nn.Module, edit: str | dict[str, Any] | Edit) -> Handle:
    """Puts an edit on a live model: `"pyramiddrop:budget=0.5"`, `{"pyramiddrop": {"budget": 0.5}}` or the edit itself.

    Raises:
        UsageError: it is no edit, or has no such setting.
        EffllmError: it cannot act on this model; the message says why.
    """
    return Handle(model, from_spec(edit, Edit))


@contextlib.contextmanager
def applied(model: nn.Module, edits: Sequence[Edit]) -> Iterator[None]:
    """While it is open, `edits` are on a live model, in their order."""
    with contextlib.ExitStack() as stack:
        for edit in edits:
            stack.enter_context(apply(model, edit))
        yield


def restructure(model: nn.Module, edits: Sequence[Edit], batches: Sequence[Batch]) -> None:
    """Puts edits of the structure on a live model for good, with the weights that they learn."""
    for edit in edits:
        learnt = {name: tensor for part in edit.learn(LiveModel(model), batches) for name, tensor in part.items()}
        before = model.state_dict().keys()
        edit.attach(model)
        _refuse_other(edit, learnt, model.state_dict().keys() - before)
        for name, tensor in learnt.items():
            model.get_parameter(name).data.copy_(tensor)


def restructured(
    checkpoint: Checkpoint, edits: Sequence[Edit], calibration: Calibration, device: torch.device, seed: int = 0
) -> Checkpoint:
    """`checkpoint` after edits of its structure: its own tensors, where the edited model has them, beside learnt ones.

    What was learnt is kept in the cache, keyed by weights, data and settings.

    Raises:
        EffllmError: an edit gives other weights than it adds; see `StoredModel`, `folder_batches`, `Edit.learn`.
    """
    for edit in edits:
        source = StoredModel(checkpoint, device=device)
        tensors = _learnt(source, edit, calibration, seed)
        before = source.model.state_dict().keys()
        edit.attach(source.model)
        after = source.model.state_dict().keys()
        _refuse_other(edit, tensors, after - before)
        kept = {key: tensor for key, tensor in checkpoint.tensors.items() if source.targets[key] not in before - after}
        done = EffllmConfig(edits=edit_entries([*edits_in(checkpoint.config), edit]))
        config = {**checkpoint.config, "quantization_config": done.to_dict()}
        checkpoint = Checkpoint(checkpoint.folder, config, kept | tensors)
    return checkpoint


def _learnt(source: StoredModel, edit: Edit, calibration: Calibration, seed: int) -> dict[str, StoredTensor]:
    """The weights that an edit learns, in files of the cache."""
    data = calibration if edit.needs_data else None
    key = data_key(source.checkpoint, data, source.device, seed, edit=edit_entries([edit]))
    journal = RunJournal(cache_folder("edits") / key[:16], key)
    with journal.claim("learn"):
        if journal.find("learnt", "all") is None:
            logger.info("%s learns its weights", edit.label())
            batches = folder_batches(data, source.model, source.checkpoint.folder) if data else []
            files = []
            for number, part in enumerate(edit.learn(source, batches)):
                files.append(f"part-{number}.safetensors")
                tensors = {name: t.to(source.dtype) if t.is_floating_point() else t for name, t in part.items()}
                write_tensors(journal.folder / files[-1], tensors)
            journal.add("learnt", "all", files=files)
        files = journal.all("learnt")["all"]["files"]
    return {name: tensor for file in files for name, tensor in read_header(journal.folder / file).items()}


def _refuse_other(edit: Edit, learnt: Iterable[str], added: set[str]) -> None:
    wrong = sorted(added.symmetric_difference(learnt))
    if wrong:
        what = "adds, and gives no values for it" if wrong[0] in added else "gives values for, and does not add"
        raise EffllmError(f"{edit.label()}: {wrong[0]} is a weight that it {what}; attach and learn must name the same")
