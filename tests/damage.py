"""Models to damage, and what tests of bad input say of a refusal: one line that names what is wrong and what would work."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from pathlib import Path

import pytest
import torch
from conftest import read_tensors, save, tiny_llama
from safetensors.torch import save_file

import effllm
from effllm import cli
from effllm.checkpoint.folder import SINGLE
from effllm.errors import EffllmError

PLAN = "uniform-4bit"
EVERYTHING = [{"sites": ["*"], "use": "quantize"}]
EMBEDDING = "model.embed_tokens.weight"
MATRIX = "model.layers.0.mlp.up_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="session")
def original(tmp_path_factory) -> Path:
    """One block, tied. Never changed."""
    return save(tiny_llama(layers=1), tmp_path_factory.mktemp("bad") / "original")


@pytest.fixture(scope="session")
def compressed(original) -> Path:
    """`original` compressed. Never changed."""
    out = original.with_name("compressed")
    effllm.compress_folder(original, out, PLAN)
    return out


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy of `original` to damage."""
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture
def packed(compressed, tmp_path) -> Path:
    """A copy of `compressed` to damage."""
    return Path(shutil.copytree(compressed, tmp_path / "packed"))


@pytest.fixture
def sharded(tmp_path) -> Path:
    """The model of `original` in three shards and an index."""
    return save(tiny_llama(layers=1), tmp_path / "sharded", shard="500KB")


def refusal(call, *args, kind: type[EffllmError] = EffllmError, **kwargs) -> str:
    """The message with which a call is refused."""
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def compress_refusal(folder: Path, plan=PLAN, **settings) -> str:
    """The message with which compressing is refused; nothing that passes for a model is left."""
    out = folder.with_name("out")
    message = refusal(effllm.compress_folder, folder, out, plan, **settings)
    assert not out.exists()
    return message


def says(message: str, *parts: object) -> None:
    """Asserts that a message holds every part."""
    for part in parts:
        assert str(part) in message, f"{part!r} is not in {message!r}"


def rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Changes tensors of a single-file checkpoint, dots written as `__`; None removes one."""
    tensors = read_tensors(folder) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / SINGLE, metadata={"format": "pt"})


def split(file: Path) -> tuple[dict, bytes]:
    """Header and tensor bytes of a safetensors file."""
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(file: Path, header: dict | bytes, body: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + body)


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command line."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(sys, "argv", ["effllm", *map(str, arguments)])
        cli.main()
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err
