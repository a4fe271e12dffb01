"""Full disks, output folders that hold something else, and damaged journals end in an error, never in half a model."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import edit_config, read_tensors
from damage import PLAN, compress_refusal, refusal, rewrite, says
from transformers import AutoModelForCausalLM

import effllm
from effllm.checkpoint.folder import SINGLE
from effllm.plans import load_plan


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """The kernel refuses to write files beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_disk_too_small(folder, monkeypatch):
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=300_000))
    says(compress_refusal(folder), folder.parent, "0.3 MB free", "needs up to 0.4 MB", "free some", "--out")
    assert not folder.with_name("out.partial").exists()


def test_disk_too_small_for_tensors_that_are_only_copied(folder, monkeypatch):
    rewrite(folder, mtp__weight=torch.zeros(1000, 1000))
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3_000_000))
    says(compress_refusal(folder), "3.0 MB free", "needs up to 4.4 MB")


def finished_after_a_failure(folder: Path, out: Path, compressed: Path) -> None:
    """Giving the same command again finishes, with the tensors of an undisturbed run."""
    effllm.compress_folder(folder, out, PLAN)
    wanted, found = read_tensors(compressed), read_tensors(out)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not out.with_name("out.partial").exists()


def test_write_that_fails(folder, compressed):
    out, partial = folder.with_name("out"), folder.with_name("out.partial")
    with largest_file(200_000):
        message = compress_refusal(folder)
    says(message, out.parent, "no room left", "free some and give the same command", partial.name)
    assert 0 < len(list(partial.glob("*.safetensors"))) < 3, "the embedding fits, the block does not"
    says(refusal(effllm.load, partial), partial, "no config.json")
    finished_after_a_failure(folder, out, compressed)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 300 KB of its own, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", disk], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("may not mount")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_full_disk(folder, compressed, small_disk, monkeypatch):
    out = small_disk / "out"
    says(refusal(effllm.compress_folder, folder, out, PLAN), small_disk, "0.3 MB free", "needs up to 0.4 MB")
    usage = shutil.disk_usage(folder)
    with monkeypatch.context() as patch:  # as if another program filled the disk meanwhile
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        message = refusal(effllm.compress_folder, folder, out, PLAN)
    says(message, small_disk, "no room left", "No space left on device", "free some and give the same command")
    assert not out.exists()
    subprocess.run(["mount", "-o", "remount,size=10m", small_disk], check=True)
    finished_after_a_failure(folder, out, compressed)


@pytest.mark.parametrize("overwrite", [False, True])
def test_output_that_is_something_else(folder, tmp_path, overwrite):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years of work")
    for out in (other, other / "thesis.txt", folder):
        message = refusal(effllm.compress_folder, folder, out, PLAN, overwrite=overwrite)
        says(message, out, "effllm did not write", "choose another --out")
    assert (other / "thesis.txt").read_text() == "years of work"
    assert (folder / SINGLE).exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_partial_folder_that_is_something_else(folder, tmp_path, overwrite):
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.txt").write_text("years of work")
    message = compress_refusal(folder, overwrite=overwrite)
    says(message, partial, "effllm did not write", "choose another --out")
    assert (partial / "thesis.txt").read_text() == "years of work"


def test_output_that_is_another_model(original, packed, tmp_path):
    old = tmp_path / "packed.old"
    old.mkdir()
    (old / "thesis.txt").write_text("years of work")
    before = (packed / "config.json").read_bytes()
    message = refusal(effllm.compress_folder, original, packed, "uniform-8bit")
    says(message, packed, "another effllm model", "--overwrite", "another --out")
    assert (packed / "config.json").read_bytes() == before
    effllm.compress_folder(original, packed, "uniform-8bit", overwrite=True)
    assert effllm.load(packed).model.layers[0].mlp.up_proj.codec.bits == 8
    assert (old / "thesis.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "packed.old"]


def test_empty_output_folder(folder, tmp_path):
    (tmp_path / "out").mkdir()
    effllm.compress_folder(folder, tmp_path / "out", PLAN)
    assert (tmp_path / "out" / "config.json").exists()


def test_failure_before_any_work_does_not_block_the_corrected_command(folder, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    plan = load_plan("layerwise-4bit").override(sources=[str(tmp_path / "short.txt")])
    says(compress_refusal(folder, plan), "short.txt has 5 tokens", "give more text")
    effllm.compress_folder(folder, tmp_path / "out", PLAN)


def journal(folder: Path, **changes) -> None:
    """Changes `quantization_config`."""
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, quantization_config=config["quantization_config"] | changes)


ENTRY = {"method": "quantize", "settings": {"bits": 4}, "sites": ["model.embed_tokens"]}
EIGHT_BITS = {"bits": 8, "group_size": 128}


@pytest.mark.parametrize(
    ("changes", "parts"),
    {
        "no list": ({"sites": "model.embed_tokens"}, ["quantization_config.sites", "no list"]),
        "number": ({"sites": 5}, ["quantization_config.sites", "no list"]),
        "entry is no object": ({"sites": ["model.embed_tokens"]}, ["method, settings and sites", "model.embed_tokens"]),
        "entry lacks a key": ({"sites": [{"method": "quantize", "sites": []}]}, ["needs method, settings and sites"]),
        "method is no word": ({"sites": [ENTRY | {"method": [1]}]}, ["needs method, settings and sites"]),
        "sites is a word": ({"sites": [ENTRY | {"sites": "model"}]}, ["needs method, settings and sites"]),
        "unknown method": (
            {"sites": [ENTRY | {"method": "quantise"}]},
            ["'quantise'", "did you mean 'quantize'?", "upgrade effllm", "install the package"],
        ),
        "score as a codec": ({"sites": [ENTRY | {"method": "lim"}]}, ["lim is no codec: it is a score"]),
        "unknown setting": ({"sites": [ENTRY | {"settings": {"bit": 4}}]}, ["'bit'", "did you mean 'bits'?"]),
        "width": ({"sites": [ENTRY | {"settings": {"bits": 9}}]}, ["bits = 9", "or equal to 8"]),
        "no path": ({"sites": [ENTRY | {"sites": ["a b"]}]}, ["'a b'", "no module path"]),
        "path of numbers": ({"sites": [ENTRY | {"sites": [5]}]}, ["5", "no module path"]),
        "twice": ({"sites": [ENTRY, ENTRY]}, ["'model.embed_tokens' twice"]),
        "unknown module": ({"sites": [ENTRY | {"sites": ["nope.{0-3}.x"]}]}, ["nope.0.x", "LlamaForCausalLM"]),
        "other width": ({"sites": [ENTRY]}, ["model.embed_tokens.codes", "another shape", "download it again"]),
        "site that is not named": ({"sites": [ENTRY | {"settings": EIGHT_BITS}]}, ["lacks model.layers.0."]),
        "newer format": ({"format": 2, "version": "9.9"}, ["format 2", "effllm 9.9", "pip install --upgrade effllm"]),
        "format is a word": ({"format": "new"}, ["format 'new'"]),
        "plan": ({"plan": "x"}, ["quantization_config.plan", "no dict"]),
        "source": ({"source": [1]}, ["quantization_config.source", "no dict"]),
    }.values(),
)
def test_journal(packed, changes, parts):
    journal(packed, **changes)
    says(refusal(effllm.load, packed), *parts)


def test_newer_format_through_transformers(packed):
    journal(packed, format=2)
    says(refusal(AutoModelForCausalLM.from_pretrained, packed), "format 2", "pip install --upgrade effllm")


def test_output_of_a_newer_effllm_is_another_model(original, packed):
    journal(packed, format=2, source=None)
    says(refusal(effllm.compress_folder, original, packed, PLAN), "another effllm model", "--overwrite")


def test_damaged_output(packed):
    file = sorted(packed.glob("*.safetensors"))[0]
    os.truncate(file, file.stat().st_size - 1)
    says(refusal(effllm.load, packed), file, "truncated")


def test_output_of_another_shape(packed):
    edit_config(packed, intermediate_size=400)
    says(refusal(effllm.load, packed), "model.layers.0.mlp.", "another shape")
