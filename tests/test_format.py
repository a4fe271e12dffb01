"""The format: every golden folder loads, a reader of its own agrees bit for bit, and damage is named."""

from __future__ import annotations

import importlib.util
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import ROOT
from reader import read
from transformers import AutoModel

import effllm
from effllm.checkpoint import Checkpoint
from effllm.errors import EffllmError
from effllm.layers.placing import codec_modules

GOLDEN = sorted(path for version in (ROOT / "tests" / "golden").iterdir() for path in version.iterdir())


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_golden", ROOT / "scripts" / "make_golden.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda path: f"{path.parent.name}, {path.name}")
def test_a_golden_folder_loads_and_decodes_to_the_bit(folder, script):
    expected = json.loads((folder / "decoded.json").read_text())
    model = effllm.load(folder)
    assert script.decoded(model) == expected["decoded"]
    logits = model(**script.one_input(model)).logits.flatten()
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda path: f"{path.parent.name}, {path.name}")
def test_the_reader_decodes_a_golden_folder_to_the_bit(folder):
    expected = json.loads((folder / "decoded.json").read_text())["decoded"]
    found = {name: zlib.crc32(np.ascontiguousarray(matrix).tobytes()) for name, matrix in read(folder).items()}
    assert found == expected


def test_the_reader_equals_decode_on_a_streamed_folder(tmp_path):
    effllm.compress_folder("demo", tmp_path / "out", "uniform-4bit", check=False)
    found = read(tmp_path / "out")
    layers = codec_modules(effllm.load(tmp_path / "out"))
    assert found.keys() == layers.keys() - {"lm_head"}
    for name, matrix in found.items():
        decoded = layers[name].codec.decode(layers[name].stored(), layers[name].matrix_shape)
        assert np.array_equal(matrix, decoded.numpy())


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda path: f"{path.parent.name}, {path.name}")
def test_one_flipped_byte_is_an_error_that_names_the_tensor(folder, tmp_path):
    tensors = list(Checkpoint.open(folder).tensors.values())
    for tensor in (tensors[0], tensors[len(tensors) // 2], tensors[-1]):
        damaged = shutil.copytree(folder, tmp_path / tensor.name)
        file = damaged / tensor.file.name
        data = bytearray(file.read_bytes())
        data[tensor.start + tensor.nbytes // 2] ^= 1
        file.write_bytes(data)
        with pytest.raises(EffllmError, match=f"tensor '{tensor.name}' is not what was written"):
            effllm.load(damaged)
        effllm.load(damaged, verify=False)


def test_checksums_that_are_none_are_refused(tmp_path):
    broken = shutil.copytree(GOLDEN[0], tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    for value in ("no base64!", "AAA=", 7):
        config["quantization_config"]["checksums"] = value
        (broken / "config.json").write_text(json.dumps(config))
        with pytest.raises(EffllmError, match="holds no valid checksums"):
            effllm.load(broken)


def test_a_folder_that_is_saved_again_carries_checksums_of_what_it_holds(tmp_path):
    model = effllm.load(GOLDEN[0]).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    assert effllm.load(tmp_path / "again").dtype == torch.bfloat16
    bare = AutoModel.from_pretrained(tmp_path / "again")
    bare.save_pretrained(tmp_path / "bare")
    effllm.load(tmp_path / "bare")


def test_golden_folders_are_never_made_again(script, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_golden.py", str(GOLDEN[0].parent)])
    with pytest.raises(SystemExit, match="made once"):
        script.main()


def test_golden_folders_are_small():
    assert all(sum(f.stat().st_size for f in Path(folder).iterdir()) < 150_000 for folder in GOLDEN)
