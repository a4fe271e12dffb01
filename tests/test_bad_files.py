"""Damaged, incomplete or hostile model folders are refused, and leave nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from conftest import read_tensors, tiny_llama
from damage import EMBEDDING, NORM, PLAN, compress_refusal, join, refusal, says, split
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import effllm
from effllm.checkpoint.folder import INDEX, SINGLE, Checkpoint
from effllm.errors import EffllmError
from effllm.source import StoredModel


@pytest.mark.parametrize("missing", [1, 5000])
def test_truncated_file(folder, missing):
    file = folder / SINGLE
    os.truncate(file, file.stat().st_size - missing)
    says(compress_refusal(folder), file, "truncated", "download it again")
    says(refusal(effllm.load, folder), file, "truncated")


def change(**values):
    """A corruption that changes what the header says of the last norm."""
    return lambda header, body: (header | {NORM: header[NORM] | values}, body)


def text_change(old: str, new: str):
    return lambda header, body: (json.dumps(header).replace(old, new).encode(), body)


@pytest.mark.parametrize(
    ("corrupt", "parts"),
    {
        "not JSON": (lambda h, b: (b"{" * 50, b), ["corrupt safetensors header"]),
        "no object": (lambda h, b: ([1], b), ["corrupt safetensors header"]),
        "no object in an entry": (lambda h, b: (h | {NORM: 5}, b), ["corrupt safetensors header"]),
        "deep": (lambda h, b: (b"[" * 100_000, b), ["corrupt safetensors header"]),
        "UTF-16": (lambda h, b: (json.dumps(h).encode("utf-16"), b), ["corrupt safetensors header"]),
        "lone surrogate": (text_change(NORM, NORM + r"\ud800"), ["corrupt safetensors header"]),
        "metadata": (lambda h, b: (h | {"__metadata__": 5}, b), ["corrupt safetensors header"]),
        "overlap": (change(data_offsets=[0, 512]), ["begins at byte 0", "corrupt"]),
        "gap": (lambda h, b: ({k: v for k, v in h.items() if k != EMBEDDING}, b), ["begins at byte", "corrupt"]),
        "backwards": (change(data_offsets=[512, 0]), [NORM, "shape [256]"]),
        "bytes for the shape": (change(shape=[255]), [NORM, "shape [255]", "512 bytes"]),
        "negative": (change(shape=[-16, -16]), [NORM, "shape [-16, -16]"]),
        "fraction": (change(shape=[256.0]), [NORM, "shape [256.0]"]),
        "boolean": (change(shape=[True, 256]), ["corrupt safetensors header"]),
        "huge shape": (text_change("[256]", f"[{10**30}]"), [f"shape [{10**30}]"]),
        "huge number": (text_change("[256]", f"[{'9' * 5000}]"), ["corrupt safetensors header"]),
        "unknown dtype": (change(dtype="F13"), ["corrupt safetensors header"]),
        "integer dtype": (change(dtype="I16"), [NORM, "I16", "no float"]),
        "other shape": (change(shape=[16, 16]), [NORM, "shape [16, 16]", "config.json describes [256]"]),
        "longer body": (lambda h, b: (h, b + b"xx"), ["bytes, but its header describes"]),
    }.values(),
)
def test_corrupt_header(folder, corrupt, parts):
    join(folder / SINGLE, *corrupt(*split(folder / SINGLE)))
    says(compress_refusal(folder), folder, *parts)


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 200) + b"{}"])
def test_header_that_does_not_fit(folder, content):
    (folder / SINGLE).write_bytes(content)
    says(compress_refusal(folder), folder / SINGLE, f"does not fit in {len(content)} bytes", "download it again")


def test_file_without_tensors(folder):
    save_file({}, folder / SINGLE)
    says(compress_refusal(folder), folder, "holds no tensor", "download")


@pytest.fixture(scope="session")
def flips(original, tmp_path_factory) -> tuple[Path, bytes, int, dict[str, torch.Tensor]]:
    """A folder to damage again and again; its file's bytes, the header's end, the true weights."""
    folder = Path(shutil.copytree(original, tmp_path_factory.mktemp("flips") / "model"))
    raw = (folder / SINGLE).read_bytes()
    return folder, raw, 8 + struct.unpack("<Q", raw[:8])[0], tiny_llama(layers=1).state_dict()


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_flipped_header_bytes(flips, data):
    folder, raw, end, truth = flips
    positions = st.integers(0, end - 1)
    changes = data.draw(st.dictionaries(positions, st.integers(0, 255) | st.sampled_from(b'0123456789"[],')))
    damaged = bytearray(raw)
    for position, value in list(changes.items())[:3]:
        damaged[position] = value
    (folder / SINGLE).write_bytes(damaged)
    try:
        source = StoredModel(Checkpoint.open(folder))
        with source.resident(*source.units):
            for name in (name for names in source.units.values() for name in names):
                assert torch.equal(source.model.state_dict()[name], truth[name])
    except EffllmError as error:
        assert str(folder) in str(error)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("../model.safetensors", ["'../model.safetensors'", "leaves the folder"]),
        ("/etc/passwd", ["'/etc/passwd'", "leaves the folder"]),
        ("a/../../b.safetensors", ["leaves the folder"]),
        (5, ["names 5"]),
        ("model-00009-of-00009.safetensors", ["model-00009-of-00009.safetensors", "download the missing shard"]),
        ("", ["download the missing shard"]),
    ],
)
def test_index_names_a_wrong_file(sharded, name, parts):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][NORM] = name
    (sharded / INDEX).write_text(json.dumps(index))
    says(compress_refusal(sharded), sharded / INDEX, *parts)


def test_missing_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    says(compress_refusal(sharded), shard.name, "download the missing shard")
    says(refusal(effllm.load, sharded), shard.name, "download the missing shard")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": "x"}', "[" * 100_000])
def test_index_without_map(sharded, content):
    (sharded / INDEX).write_text(content)
    says(compress_refusal(sharded), sharded / INDEX, "no valid index", "weight_map")


def test_empty_index(sharded):
    (sharded / INDEX).write_text('{"weight_map": {}}')
    says(compress_refusal(sharded), sharded, "holds no tensor")


def test_index_names_a_missing_tensor(sharded):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["model.nope.weight"] = index["weight_map"][NORM]
    (sharded / INDEX).write_text(json.dumps(index))
    says(compress_refusal(sharded), index["weight_map"][NORM], "'model.nope.weight'", "does not hold")


def test_tensor_in_two_shards(sharded):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    name, tensor = next(iter(read_tensors(sharded).items()))
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = next(file for file in (first, second) if file.name != weight_map[name])
    with_copy = {key: value for key, value in read_tensors(sharded).items() if weight_map[key] == other.name}
    save_file(with_copy | {name: tensor + 1}, other, metadata={"format": "pt"})
    says(compress_refusal(sharded), name, weight_map[name], other.name, "both hold")


def test_pickle(folder):
    (folder / SINGLE).unlink()
    torch.save({}, folder / "pytorch_model.bin")
    message = compress_refusal(folder)
    says(message, folder, "pytorch_model.bin", "can run code", "save_pretrained")


def test_no_weights(folder):
    (folder / SINGLE).unlink()
    says(compress_refusal(folder), folder, SINGLE, INDEX)


def test_file_link_that_leaves_the_folder(folder, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    (folder / "notes.txt").symlink_to(secret)
    says(compress_refusal(folder), folder / "notes.txt", secret, "outside the model folder", "replace it by a copy")
    assert not (tmp_path / "out.partial").exists(), "refused before any work"


def test_links_of_a_hub_cache(original, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in original.iterdir():
        shutil.copy(file, blobs / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"blob-{file.name}"))
    effllm.compress_folder(snapshot, tmp_path / "out", PLAN)
    copied = tmp_path / "out" / "tokenizer.json"
    assert not copied.is_symlink()
    assert copied.read_bytes() == (original / "tokenizer.json").read_bytes()
