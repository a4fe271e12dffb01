"""Bad input is refused in one line that names what is wrong and what would work, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import edit_config, read_tensors, save, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import effllm
from effllm import cli
from effllm.checkpoint.folder import INDEX, SINGLE, Checkpoint
from effllm.errors import EffllmError, UsageError
from effllm.plans import load_plan
from effllm.registry import from_spec
from effllm.source import StoredModel

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


# Plans


@pytest.mark.parametrize(
    ("plan", "parts"),
    {
        "key of a plan": ({"stesp": EVERYTHING}, ["unknown key 'stesp'", "did you mean 'steps'?"]),
        "key of a step": ({"steps": [{"sites": ["*"], "usee": "quantize"}]}, ["'steps.0.usee'", "did you mean 'use'?"]),
        "key of the calibration": ({"steps": EVERYTHING, "calibration": {"sampels": 3}}, ["sampels", "'samples'?"]),
        "method": ({"steps": [{"sites": ["*"], "use": "quantise:bits=4"}]}, ["'quantise'", "did you mean 'quantize'?"]),
        "score": (
            {"steps": [{"sites": ["*"], "order": "lin", "high": "quantize", "low": "quantize", "average_bits": 4}]},
            ["unknown score 'lin'", "did you mean 'lim'?"],
        ),
        "setting": ({"steps": [{"sites": ["*"], "use": "quantize:bit=4"}]}, ["'bit'", "did you mean 'bits'?"]),
        "width of 1": ({"steps": [{"sites": ["*"], "use": "quantize:bits=1"}]}, ["bits = '1'", "or equal to 2"]),
        "width of 9": ({"steps": [{"sites": ["*"], "use": {"quantize": {"bits": 9}}}]}, ["bits = 9", "or equal to 8"]),
        "width of 4.5": ({"steps": [{"sites": ["*"], "use": "quantize:bits=4.5"}]}, ["bits = '4.5'", "integer"]),
        "low above high": (
            {"steps": [{"sites": ["*"], "order": "zd", "high": "quantize:bits=2", "low": "quantize:bits=4",
                        "average_bits": 3}]},
            ["low below high", "4 and 2"],
        ),
        "average": (
            {"steps": [{"sites": ["*"], "order": "zd", "high": "quantize:bits=4", "low": "quantize:bits=2",
                        "average_bits": 5}]},
            ["average_bits = 5", "2 to 4"],
        ),
        "no layer": ({"steps": [{"sites": ["vision.*"], "use": "quantize"}]}, ["'vision.*'", "model.embed_tokens"]),
        "every layer excluded": ({"steps": EVERYTHING, "exclude": ["*"]}, ["plan custom matches no layer"]),
        "preset": ("unifrm-4bit", ["'unifrm-4bit'", "did you mean 'uniform-4bit'?"]),
    }.values(),
)  # fmt: skip
def test_plan(original, plan, parts):
    says(refusal(effllm.plan, original, plan, kind=UsageError), *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("steps: [", ["not valid YAML"]),
        ("when: 2024-99-99", ["not valid YAML", "month must be in 1..12"]),
        ("[]", ["holds no plan", "'steps'"]),
        ("stesp: []", ["unknown key 'stesp'", "did you mean 'steps'?"]),
        ("#" * 1_000_001, ["larger than 1000000 bytes"]),
    ],
)
def test_plan_file(tmp_path, text, parts):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    says(refusal(load_plan, file, kind=UsageError), file, *parts)


@pytest.mark.parametrize("source", ["../secret.txt", "/etc/passwd", "texts/../../secret.txt@2"])
def test_plan_file_may_not_reach_outside_its_folder(tmp_path, source):
    (tmp_path / "secret.txt").write_text("secret")
    file = tmp_path / "plans" / "plan.yaml"
    file.parent.mkdir()
    file.write_text(json.dumps({"steps": EVERYTHING, "calibration": {"sources": [source]}}))
    says(
        refusal(load_plan, file, kind=UsageError), source.partition("@")[0], "leaves the plan's folder", "--calibration"
    )


def test_ordering_needs_repeated_blocks():
    model = nn.Sequential(nn.Linear(16, 16))
    says(refusal(effllm.compress, model, "layerwise-4bit", kind=UsageError), "layerwise-4bit", "use a uniform plan")


# Files


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


# Configs


@pytest.mark.parametrize(
    ("changes", "parts"),
    {
        "unknown class": (
            {"architectures": ["NopeForCausalLM"]},
            ["'NopeForCausalLM'", "upgrade transformers", "effllm.compress(model)"],
        ),
        "unknown type": ({"model_type": "nope"}, ["'nope'", "upgrade transformers", "effllm.compress(model)"]),
        "no type": ({"model_type": None}, ["no model_type"]),
        "no class": ({"architectures": None}, ["'architectures'", "such as LlamaForCausalLM"]),
        "class is a number": ({"architectures": 5}, ["'architectures'", "such as LlamaForCausalLM"]),
        "class is an object": ({"architectures": {"a": 1}}, ["'architectures'", "such as LlamaForCausalLM"]),
        "width is a word": ({"hidden_size": "wide"}, ["LlamaForCausalLM", "hidden_size", "'wide'"]),
        "negative width": ({"hidden_size": -4}, ["LlamaForCausalLM", "-4"]),
        "heads": ({"num_attention_heads": 3}, ["LlamaForCausalLM", "256", "attention heads (3)"]),
        "activation": ({"hidden_act": "nope"}, ["LlamaForCausalLM", "nope"]),
        "integer dtype": ({"dtype": "int8"}, ["config.json", "'int8'", "no float dtype"]),
        "unknown dtype": ({"dtype": "nope"}, ["config.json", "'nope'", "no float dtype"]),
        "text_config": ({"text_config": "x"}, ["config.json", "text_config = 'x'"]),
        "quantization_config": ({"quantization_config": "x"}, ["config.json", "quantization_config = 'x'"]),
        "other shapes": ({"intermediate_size": 400}, ["down_proj", "[256, 384]", "config.json describes [256, 400]"]),
        "more layers": ({"num_hidden_layers": 2}, ["lacks model.layers.1."]),
    }.values(),
)
def test_config(folder, changes, parts):
    edit_config(folder, **changes)
    says(refusal(effllm.plan, folder, PLAN), *parts)
    says(compress_refusal(folder), *parts)
    says(refusal(effllm.load, folder), *parts)


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "\xff", "[" * 100_000])
def test_config_that_is_no_object(folder, content):
    (folder / "config.json").write_text(content, encoding="latin-1")
    says(compress_refusal(folder), folder / "config.json", "JSON")


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    says(compress_refusal(folder), folder, "no config.json", "name a Hugging Face model folder")


@pytest.mark.parametrize("name", [MATRIX, NORM, EMBEDDING, "model.layers.0.input_layernorm.weight"])
def test_weight_that_lacks(folder, name):
    rewrite(folder, **{name.replace(".", "__"): None})
    says(refusal(effllm.plan, folder, PLAN), folder, f"lacks {name}")
    says(refusal(effllm.load, folder), folder, "lacks")
    says(compress_refusal(folder), folder, f"lacks {name}", "LlamaForCausalLM", "download it again")


@pytest.mark.parametrize("method", ["gptq", "fp8", "bitsandbytes", "awq"])
def test_quantised_already(folder, method):
    edit_config(folder, quantization_config={"quant_method": method})
    says(compress_refusal(folder), folder, "quantised already", method, "compress the original weights")


def test_quantised_without_saying_so(folder):
    rewrite(folder, **{MATRIX.replace(".", "__"): torch.zeros(384, 256, dtype=torch.float8_e4m3fn)})
    says(compress_refusal(folder), MATRIX, "F8_E4M3", "quantised already", "compress the original weights")


def test_compressed_again(packed):
    says(compress_refusal(packed), packed, "quantised already", "'effllm'", "compress the original weights")
    model = effllm.load(packed)
    says(refusal(effllm.compress, model, PLAN), "quantised already", "compress the original weights")


def test_compressed_again_in_memory():
    model = effllm.compress(tiny_llama(layers=1), PLAN)
    says(refusal(effllm.compress, model, PLAN), "quantised already", "compress the original weights")


# Weights


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [MATRIX, EMBEDDING, NORM])
def test_weight_that_is_not_finite(folder, name, value):
    tensor = read_tensors(folder)[name]
    tensor.view(-1)[-1] = value
    rewrite(folder, **{name.replace(".", "__"): tensor})
    says(compress_refusal(folder), name, "NaN or inf", "download it again")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_live_weight_that_is_not_finite(value):
    model = tiny_llama(layers=1)
    model.get_parameter("model.layers.0.mlp.down_proj.weight").data[3, 5] = value
    before = copy.deepcopy(model.state_dict())
    says(refusal(effllm.compress, model, PLAN), "model.layers.0.mlp.down_proj.weight", "NaN or inf")
    after = model.state_dict()
    assert after.keys() == before.keys(), "the model is left as it was"
    assert all(torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in before)


def test_dtype_too_narrow(folder):
    tensor = read_tensors(folder)[MATRIX]
    tensor[0, 0] = 1e5
    rewrite(folder, **{MATRIX.replace(".", "__"): tensor})
    says(compress_refusal(folder, dtype=torch.float16), MATRIX, "torch.float16", "too narrow", "try another dtype")


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("columns", "groups"), [(200, 4), (65, 2), (63, 1), (9, 1)])
def test_group_that_does_not_divide_the_row(columns, groups, symmetric):
    codec = from_spec({"quantize": {"bits": 4, "group_size": 64, "symmetric": symmetric, "range": "minmax"}})
    weight = torch.randn(12, columns, generator=torch.Generator().manual_seed(0))
    stored = codec.encode(weight)
    assert stored["scale"].shape == (12, groups)
    zeros = 0 if symmetric else math.ceil(groups * 4 / 8)
    counted = 12 * (math.ceil(columns * 4 / 8) + 2 * groups + zeros)
    assert codec.stored_bytes((12, columns)) == counted == sum(tensor.nbytes for tensor in stored.values())
    width = stored["scale"].float().abs().repeat_interleave(64, dim=1)[:, :columns]
    assert bool(((codec.decode(stored, (12, columns)) - weight).abs() <= 1.01 * width).all())


def test_model_whose_rows_no_group_divides(tmp_path, tokens):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=260, hidden_size=200, intermediate_size=264, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    folder = save(model, tmp_path / "odd")
    expected = effllm.plan(folder, PLAN)
    effllm.compress_folder(folder, tmp_path / "out", PLAN)
    written = sum(tensor.nbytes for tensor in read_tensors(tmp_path / "out").values())
    assert written - 1 == expected.memory.weights, "all but the guard is counted"
    loaded = effllm.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, effllm.compress(model, PLAN)(tokens).logits)


def test_tied_in_the_config_but_not_in_the_checkpoint(folder):
    embedding = read_tensors(folder)[EMBEDDING]
    rewrite(folder, lm_head__weight=embedding.clone())
    effllm.plan(folder, PLAN)
    rewrite(folder, lm_head__weight=embedding + 1)
    says(compress_refusal(folder), folder, "lm_head.weight", EMBEDDING, "set tie_word_embeddings to false")
    edit_config(folder, tie_word_embeddings=False)
    effllm.compress_folder(folder, folder.with_name("out"), PLAN)


def test_tied_bias(tmp_path):
    config = BertConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = BertForMaskedLM(config).eval()
    nn.init.normal_(model.cls.predictions.bias)
    model.save_pretrained(tmp_path / "bert")
    effllm.compress_folder(tmp_path / "bert", tmp_path / "out", PLAN)
    loaded = effllm.load(tmp_path / "out")
    assert torch.equal(loaded.cls.predictions.decoder.bias, model.cls.predictions.bias)


def test_tensors_that_the_class_does_not_load(folder, tmp_path, tokens):
    extra = {
        "mtp.0.proj.weight": torch.randn(33, 7).bfloat16(),
        "mtp.0.ids": torch.arange(5),
        "mtp.0.scale": torch.randn(3).to(torch.float8_e4m3fn),
    }
    rewrite(folder, **{name.replace(".", "__"): tensor for name, tensor in extra.items()})
    plain = effllm.plan(folder, {"steps": EVERYTHING})
    assert sorted(plain.unloaded) == sorted(extra)
    out = tmp_path / "out"
    result = effllm.compress_folder(folder, out, PLAN)
    assert result.stored_bytes == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    written = read_tensors(out)
    for name, tensor in extra.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8))
    with torch.no_grad():
        assert torch.isfinite(effllm.load(out)(tokens).logits).all()
    assert "already done" in effllm.compress_folder(folder, out, PLAN).message


# Live models of any kind


class Unknown(nn.Module):
    """No architecture that anyone knows."""

    def __init__(self):
        super().__init__()
        self.picture = nn.ConvTranspose2d(3, 16, 3)
        self.inner = nn.ModuleDict({"one": nn.Linear(16, 32), "two": nn.Linear(32, 8, bias=False)})

    def forward(self, x):
        return self.inner["two"](self.inner["one"](self.picture(x).mean((2, 3))).relu())


def test_unknown_live_architecture(caplog):
    torch.manual_seed(0)
    model, x = Unknown().eval(), torch.randn(2, 3, 8, 8)
    plain = model(x)
    with caplog.at_level(logging.WARNING, logger="effllm"):
        effllm.compress(model, "uniform-8bit")
    assert list(model.effllm_report) == ["inner.one", "inner.two"]
    assert type(model.picture) is nn.ConvTranspose2d
    assert torch.allclose(model(x), plain, atol=0.02) and not torch.equal(model(x), plain)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("effllm")]
    assert any("picture.weight" in message and "stays as it is" in message for message in told)
    assert not any("inner" in message and "weight" in message for message in told)


def test_live_model_without_a_matrix():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3))
    says(refusal(effllm.compress, model, PLAN, kind=UsageError), "matches no layer", "none")


# A full disk


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


# Output folders


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


# The journal in config.json


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
        "score as a codec": ({"sites": [ENTRY | {"method": "lim"}]}, ["unknown codec 'lim'"]),
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


# The command line


WRONG = {
    (): None,
    ("nope",): "No such command 'nope'; see effllm --help",
    ("compress",): "see effllm compress --help",
    ("compress", "MODEL", "--nope"): "--nope",
    ("compress", "MODEL", "--samples", "0"): "--samples",
    ("compress", "MODEL", "--samples", "many"): "--samples",
    ("compress", "MODEL", "--plan", "unifrm-4bit"): "did you mean 'uniform-4bit'?",
    ("compress", "MODEL", "--dtype", "int8"): "--dtype int8: known: float32",
    ("compress", "MODEL", "--device", "nope"): "--device nope",
    ("compress", "MODEL", "--out", "OUT", "--calibration", "no.txt"): "no text file or folder 'no.txt'",
    ("compress", "MODEL", "--out", "OUT", "--calibration", "default@0"): "weight after @",
    ("compress", "MODEL", "--out", "OUT", "--calibration", "default@inf"): "weight after @",
    ("compress", "nothing"): "'nothing' is no folder, no alias and no hub id (owner/name)",
    ("compress", "a--/b.."): "no valid hub id",
    (
        "plan",
        "MODEL",
        "--set",
        "nope.*=quantize",
    ): "'nope.*' matches no layer of the model; its sites: model.embed_tokens",
    ("plan", "MODEL", "--set", "*=quantise"): "did you mean 'quantize'?",
    ("plan", "MODEL", "--set", "*=quantize:bits=9"): "less than or equal to 8",
    ("plan", "MODEL", "--set", "*"): "GLOB=METHOD:key=value",
    ("plan", "MODEL", "--exclude", "nope.*"): "'nope.*' matches no layer of the model; its sites: model.embed_tokens",
    ("plan", "MODEL", "--score", "lin"): "did you mean 'lim'?",
    ("plan", "MODEL", "--plan", PLAN, "--score", "zd"): "orders nothing",
    ("methods", "quantise"): "did you mean 'quantize'?",
    ("chat", "MODEL", "--temperature", "-1"): "--temperature",
}


@pytest.mark.parametrize("arguments", list(WRONG), ids=" ".join)
def test_wrong_usage(original, tmp_path, capsys, arguments):
    names = {"MODEL": original, "OUT": tmp_path / "out"}
    status, out, err = run(capsys, *(names.get(argument, argument) for argument in arguments))
    assert status == 2
    if WRONG[arguments] is None:
        assert "Usage" in out + err
        return
    assert out == ""
    assert err.startswith("effllm: ") and err.count("\n") == 1
    says(err, WRONG[arguments])
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


FAILURES = {
    "truncated": (
        lambda folder: os.truncate(folder / SINGLE, 1000),
        ["compress", "MODEL", "--out", "OUT"],
        "truncated",
    ),
    "quantised": (
        lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq"}),
        ["plan", "MODEL"],
        "quantised already",
    ),
    "tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text('{"model": 5}'),
        ["compress", "MODEL", "--out", "OUT"],
        "no usable tokenizer",
    ),
    "no tokenizer": (no_tokenizer, ["compress", "MODEL", "--out", "OUT"], "no usable tokenizer"),
    "class": (lambda folder: edit_config(folder, architectures=["Nope"]), ["eval", "MODEL"], "upgrade transformers"),
    "config": (lambda folder: edit_config(folder, hidden_size="x"), ["chat", "MODEL", "--prompt", "x"], "hidden_size"),
    "output": (lambda folder: None, ["compress", "MODEL", "--out", "MODEL"], "choose another --out"),
    "no network": (lambda folder: None, ["compress", "somebody/something"], "check the network"),
    "no folder": (lambda folder: None, ["plan", "MODEL", "-o", "OUT/plan.yaml"], "No such file or directory"),
}


@pytest.mark.parametrize("case", list(FAILURES))
def test_failure(folder, tmp_path, capsys, case):
    damage, arguments, part = FAILURES[case]
    damage(folder)
    names = {"MODEL": str(folder), "OUT": str(tmp_path / "out"), "OUT/plan.yaml": str(tmp_path / "out" / "plan.yaml")}
    status, out, err = run(capsys, *(names.get(argument, argument) for argument in arguments))
    assert (status, out) == (1, "")
    assert err.startswith("effllm: ") and err.count("\n") == 1
    says(err, part)
    assert not (tmp_path / "out").exists()


def test_error_of_several_lines_takes_one(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError("no connection\nCheck the network.")

    monkeypatch.setattr(effllm, "compress_folder", fail, raising=False)
    assert run(capsys, "compress", "x") == (1, "", "effllm: no connection Check the network.\n")


def test_interrupted(monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(effllm, "compress_folder", interrupt, raising=False)
    assert run(capsys, "compress", "x") == (130, "", "effllm: interrupted; the same command resumes\n")


def test_debug_shows_where(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["effllm", "--debug", "plan", "nothing"])
    with pytest.raises(UsageError):
        cli.main()


def test_failure_in_a_process_of_its_own(folder):
    os.truncate(folder / SINGLE, 1000)
    command = [sys.executable, "-m", "effllm.cli", "compress", str(folder), "--out", str(folder.with_name("out"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("effllm: ") and done.stderr.count("\n") == 1
    says(done.stderr, folder / SINGLE, "truncated", "download it again")


def test_no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refusal(effllm.plan, "somebody/something", PLAN)
    says(message, "'somebody/something'", "cannot reach the hub", "check the network")


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.txt", b"\xff\xfe\xff", "cannot be read as text"),
        ("a.jsonl", b'{"text": ', "cannot be read as text"),
        ("a.jsonl", b'{"txt": "x"}', "needs 'text' or 'messages'"),
        ("a.json", b"5", "holds no JSON list"),
        ("a.json", b'{"text": "x"}', "holds no JSON list"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}', "no chat template; give plain text"),
        ("a.txt", b"", "has 0 tokens, fewer than one window of 512; give more text"),
    ],
)
def test_calibration_text(folder, tmp_path, name, content, part):
    (tmp_path / name).write_bytes(content)
    says(compress_refusal(folder, load_plan("layerwise-4bit").override(sources=[str(tmp_path / name)])), part)
    assert not (tmp_path / "out.partial").exists()
