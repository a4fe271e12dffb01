"""The shards of a streamed output: what each of them holds, and writing one that is whole or absent."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from effllm import hf
from effllm.checkpoint.skeleton import quiet
from effllm.data.inputs import folder_batches
from effllm.layers.placing import Members, decode_stored, encoded_module, read_stored, refuse_nonfinite
from effllm.plans import Plan
from effllm.resume import file_digest
from effllm.site import norms_with_statistics
from effllm.source import StoredModel
from effllm.statistics.again import Seen
from effllm.surgery import STATISTICS, refit_norms, refits_norms
from effllm.train import encode_unit

EXTRA, NORMS = "extra", "norms"


def shard_units(source: StoredModel, plan: Plan) -> list[str]:
    """The units of the output, a shard each: those of the source, tensors that its class does not load, refitted norms."""
    extra = [EXTRA] if source.unloaded else []
    return [*source.units, *extra, *([NORMS] if refits_norms(source.model, plan) else [])]


def unit_tensors(
    source: StoredModel, plan: Plan, unit: str, members: dict[str, Members], seen: Seen | None,
    written: Callable[[str], dict[str, Tensor]],
) -> dict[str, Tensor]:  # fmt: skip
    """What the shard of a unit holds, with `members` from `by_parameter` and `seen`, what came by at it, if anything.

    Statistics that are refitted have a shard of their own, made from the whole model as it is `written` in other shards.
    """
    if unit == EXTRA:
        return _extra(source)
    if unit == NORMS:
        return _norms(source, plan, members, written)
    tensors = _encode_unit(source, unit, members, seen)
    if refits_norms(source.model, plan):
        stale = {f"{name}.{key}" for name in norms_with_statistics(source.model) for key in STATISTICS}
        return {name: tensor for name, tensor in tensors.items() if name not in stale}
    return tensors


def _norms(
    source: StoredModel, plan: Plan, members: dict[str, Members], written: Callable[[str], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The statistics of batch norms in the compressed model, which is in memory as a whole for it."""
    with quiet():
        model = type(source.model).from_pretrained(source.checkpoint.folder, dtype=source.dtype).eval()
    state = model.state_dict()
    for unit, names in source.units.items():
        tensors = written(unit) if members.keys() & set(names) else {}
        for parameter in members.keys() & set(names):
            state[parameter].copy_(decode_stored(model, members[parameter], read_stored(members[parameter], tensors)))
    return refit_norms(model, folder_batches(plan.calibration, model, source.checkpoint.folder))


def _extra(source: StoredModel) -> dict[str, Tensor]:
    """The checkpoint's tensors that the class does not load, byte for byte."""
    return {key: source.raw(key) for key in source.unloaded}


def _encode_unit(source: StoredModel, unit: str, members: dict[str, Members], seen: Seen | None) -> dict[str, Tensor]:
    """Everything that the output stores of one unit, by module path."""
    tensors: dict[str, Tensor] = {}
    dense = source.model.state_dict().keys()
    with source.resident(unit):
        own = {name: members[name] for name in source.units[unit] if name in members}
        stored = encode_unit(source.model, own, seen)
        for name in source.units[unit]:
            owner, _, leaf = name.rpartition(".")
            module = source.model.get_submodule(owner)
            if name in members:
                layer = encoded_module(module, members[name], stored[name]).state_dict(prefix=f"{owner}.")
                tensors |= {key: tensor for key, tensor in layer.items() if key not in dense}
            else:
                tensors[name] = getattr(module, leaf)
                if isinstance(tensors[name], nn.Parameter):
                    refuse_nonfinite(name, tensors[name])
        if (guard := hf.guarded(source.model, list(members))) in source.units[unit]:
            tensors[str(guard)] = torch.zeros(1, dtype=torch.uint8)
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def write_shard(file: Path, tensors: dict[str, Tensor]) -> str:
    """Writes a safetensors file that is whole or absent; returns its SHA-256."""
    scratch = file.with_name(file.name + ".tmp")  # a folder: safetensors has temporary files of its own
    clear(scratch)
    scratch.mkdir()
    temporary = scratch / file.name
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(temporary)) from None
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.chmod(0o644)  # safetensors writes files that only their owner may read
    digest = file_digest(temporary)
    temporary.replace(file)
    scratch.rmdir()
    return digest


def clear(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
