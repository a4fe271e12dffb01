"""Peak memory at full width: compressing Llama-7B-, Whisper- and ViT-shaped checkpoints, and loading what comes out.

pytest tests/test_large.py -m slow            # makes and deletes checkpoints of 2.1, 5.4, 0.9 and 1 GB
EFFLLM_REAL_MODEL=FOLDER pytest tests/test_large.py -m real_model
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MEASURE = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(json.dumps({"code": done.returncode, "peak": peak, "stdout": done.stdout.decode()}))
"""
THREE_TOKENS = """
import sys, torch, effllm
model = effllm.load(sys.argv[1])
model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
"""


def measured(*command: str | Path) -> dict:
    """Runs a command under a small parent: the peak is its own, not that of this process before the fork."""
    shell = [sys.executable, "-c", MEASURE, *map(str, command)]
    began = time.monotonic()
    found = json.loads(subprocess.run(shell, check=True, stdout=subprocess.PIPE).stdout)
    assert found["code"] == 0, found["stdout"]
    return found | {"seconds": time.monotonic() - began}


def effllm(*arguments: str | Path) -> dict:
    return measured(sys.executable, "-m", "effllm.cli", *arguments)


def large_checkpoint():
    spec = importlib.util.spec_from_file_location("make_large", ROOT / "scripts" / "make_large_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass
class Compressed:
    folder: Path
    peak: int
    stored_bytes: int


@pytest.fixture(scope="module")
def compressed(tmp_path_factory) -> Iterator[dict[int, Compressed]]:
    """A 4- and a 12-layer checkpoint, compressed; each original is deleted at once, the outputs at the end."""
    base = tmp_path_factory.mktemp("large")
    if shutil.disk_usage(base).free < 10e9:
        pytest.skip("needs 10 GB of disk")
    script, found = large_checkpoint(), {}
    try:
        for layers in (4, 12):
            source, out = base / f"llama-{layers}", base / f"out-{layers}"
            script.make(source, layers)
            run = effllm("compress", source, "--plan", "layerwise-4bit", "--score", "zd", "--out", out, "--json")
            script.delete(source)
            found[layers] = Compressed(out, run["peak"], json.loads(run["stdout"])["stored_bytes"])
            sys.stderr.write(f"{layers} layers: peak {run['peak'] / 1e9:.2f} GB, {run['seconds']:.0f} s\n")
        yield found
    finally:
        shutil.rmtree(base, ignore_errors=True)


@pytest.mark.slow
def test_peak_memory_is_below_3_gb_and_does_not_grow_with_depth(compressed):
    assert compressed[4].peak < 3e9
    assert compressed[12].peak < 3e9
    assert compressed[12].peak <= 1.1 * compressed[4].peak


@pytest.mark.slow
def test_printed_size_is_the_size_on_disk(compressed):
    for output in compressed.values():
        assert output.stored_bytes == sum(file.stat().st_size for file in output.folder.glob("*.safetensors"))


def assert_loads_lean(folder: Path) -> None:
    """Loading and running three tokens takes at most 1.15 times the stored bytes, beside what importing takes.

    `import transformers` alone imports next to nothing; the base class of its models is what any model needs.
    """
    empty = measured(sys.executable, "-c", "import torch, transformers.modeling_utils")["peak"]
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    peak = measured(sys.executable, "-c", THREE_TOKENS, folder)["peak"]
    sys.stderr.write(
        f"{folder.name}: peak {peak / 1e6:.0f} MB, empty {empty / 1e6:.0f} MB, stored {stored / 1e6:.0f} MB\n"
    )
    assert peak <= 1.15 * stored + empty, f"{(peak - empty) / stored:.2f} x the stored bytes"


@pytest.mark.slow
def test_reload_of_a_large_model_is_lean(compressed):
    assert_loads_lean(compressed[4].folder)


@pytest.mark.slow
def test_a_budget_is_priced_and_solved_in_4_gb_at_full_width(tmp_path, monkeypatch):
    """2048 tokens: statistics, prices of plain and rotated options, probes, and the rewrite of one block."""
    if shutil.disk_usage(tmp_path).free < 5e9:
        pytest.skip("needs 5 GB of disk")
    monkeypatch.setenv("EFFLLM_CACHE", str(tmp_path / "cache"))
    source, out = tmp_path / "llama-1", tmp_path / "out"
    large_checkpoint().make(source, 1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "effllm" / "demo" / name, source)
    budget = ("--budget", "4bpw", "--exclude", "model.embed_tokens", "--exclude", "lm_head", "--samples", "4")
    run = effllm("compress", source, *budget, "--no-check", "--out", out, "--json")
    sys.stderr.write(f"1 layer: peak {run['peak'] / 1e9:.2f} GB, {run['seconds']:.0f} s\n")
    assert run["peak"] < 4e9 and json.loads(run["stdout"])["predicted_kl"] > 0


MAKE = """
import sys, torch, transformers
cls, config, layers, folder = sys.argv[1], eval(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
names = ("num_hidden_layers",) if "hidden_size" in config else ("encoder_layers", "decoder_layers")
config = getattr(transformers, cls.partition("For")[0] + "Config")(**config, **dict.fromkeys(names, layers))
torch.manual_seed(0)
getattr(transformers, cls)._from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="500MB")
"""
WIDE = {
    "WhisperForConditionalGeneration": (
        {"d_model": 1280, "encoder_ffn_dim": 5120, "decoder_ffn_dim": 5120, "encoder_attention_heads": 20,
         "decoder_attention_heads": 20, "vocab_size": 51865, "num_mel_bins": 80}, 10,
    ),
    "ViTForImageClassification": (
        {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 16, "patch_size": 14}, 26,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("cls", WIDE)
def test_speech_and_vision_models_of_1_gb_stream_in_the_memory_of_a_block(cls, tmp_path):
    config, layers = WIDE[cls]
    peaks = {}
    for depth in (2, layers):
        source = tmp_path / f"source-{depth}"
        measured(sys.executable, "-c", MAKE, cls, repr(config), str(depth), source)
        stored = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        run = effllm(
            "compress", source, "--plan", "layerwise-4bit", "--score", "zd", "--out", tmp_path / "out", "--json"
        )
        peaks[depth] = run["peak"]
        sys.stderr.write(f"{cls}, {depth} layers, {stored / 1e9:.2f} GB: peak {run['peak'] / 1e6:.0f} MB\n")
        shutil.rmtree(source)
        shutil.rmtree(tmp_path / "out")
    assert stored > 1e9
    assert peaks[layers] <= 1.1 * peaks[2]


@pytest.mark.real_model
@pytest.mark.parametrize("preset", ["layerwise-4bit", "layerwise-3bit", "uniform-4bit", "uniform-8bit"])
def test_reload_of_a_real_model_is_lean(preset, tmp_path):
    model = os.environ.get("EFFLLM_REAL_MODEL")
    if not model:
        pytest.skip("EFFLLM_REAL_MODEL names no model folder")
    effllm("compress", model, "--plan", preset, "--samples", "2", "--no-check", "--out", tmp_path / preset, "--json")
    assert_loads_lean(tmp_path / preset)


@pytest.fixture(scope="module")
def small_script():
    """The checkpoint maker at a width that takes no time."""
    module = large_checkpoint()
    module.HIDDEN, module.INNER, module.HEADS, module.VOCABULARY = 256, 384, 4, 512
    return module


def test_the_large_checkpoint_is_a_sound_one_and_depends_on_seed_and_name_only(small_script, tmp_path):
    from conftest import read_tensors

    import effllm as package
    from effllm.checkpoint import Checkpoint

    size = small_script.make(tmp_path / "two", 2)
    assert size == Checkpoint.open(tmp_path / "two").stored_bytes
    assert package.load(tmp_path / "two").num_parameters() == sum(
        t.numel() for t in read_tensors(tmp_path / "two").values()
    )
    small_script.make(tmp_path / "three", 3)
    small_script.make(tmp_path / "other", 2, seed=1)
    two, three, other = (read_tensors(tmp_path / name) for name in ("two", "three", "other"))
    assert all(tensor.equal(three[name]) for name, tensor in two.items())
    matrices = [name for name, tensor in two.items() if tensor.dim() == 2]
    assert not any(two[name].equal(other[name]) for name in matrices)
    assert all(abs(float(two[name].float().std()) - 0.02) < 1e-3 for name in matrices)


def test_delete_removes_its_own_checkpoints_only(small_script, tmp_path):
    small_script.make(tmp_path / "two", 2)
    small_script.delete(tmp_path / "two")
    assert not (tmp_path / "two").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text('{"num_hidden_layers": 2}')
    with pytest.raises(SystemExit, match="not deleted"):
        small_script.delete(tmp_path / "mine")
