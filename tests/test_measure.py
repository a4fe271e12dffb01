"""Measuring: figures against a direct computation, memory against real caches, one Result document."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from test_loading import FAMILIES

import effllm
from effllm.checkpoint import Checkpoint
from effllm.data.text import token_windows
from effllm.measure.evaluate import compare
from effllm.measure.memory import kv_cache
from effllm.measure.result import Result, bits_per_weight, schema


def test_figures_equal_a_direct_computation(tokens):
    model, baseline = tiny_llama(dtype=torch.float32), tiny_llama(dtype=torch.float32)
    effllm.compress(model, "uniform-4bit")
    figures = compare(model, tokens, baseline).figures()
    log_q = model(tokens).logits[:, :-1].double().log_softmax(-1)
    log_p = baseline(tokens).logits[:, :-1].double().log_softmax(-1)
    nll = -log_q.gather(-1, tokens[:, 1:, None]).mean()
    assert math.isclose(figures["perplexity"], float(nll.exp()), rel_tol=1e-4)
    assert math.isclose(figures["kl"], float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel_tol=1e-3)
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean()
    assert math.isclose(figures["top1_agreement"], float(agreement), rel_tol=1e-9)
    assert figures["kl_tokens"] == figures["perplexity_tokens"] == 2 * 16


def test_a_model_compared_with_itself(tokens):
    model = tiny_llama()
    figures = compare(model, tokens, model).figures()
    assert figures["kl"] == 0 and figures["top1_agreement"] == 1
    assert figures["perplexity"] == figures["baseline_perplexity"]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox", "qwen2"])
@pytest.mark.parametrize("context", [5, 17])
def test_kv_cache_estimate_is_exact(family, context):
    model = FAMILIES[family]()
    cache = model(torch.ones(1, context, dtype=torch.long), use_cache=True).past_key_values
    real = [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers]
    estimated = kv_cache(model.config, context, model.dtype)
    window = getattr(model.config, "sliding_window", None) or context
    for index, (found, wanted) in enumerate(zip(estimated, real, strict=True)):
        slack = found // window if "sliding" in str(getattr(model.config, "layer_types", [""] * 9)[index]) else 0
        assert wanted <= found <= wanted + slack, "a sliding cache keeps up to one token less than its window"


def test_result_document_is_complete_and_versioned(llama_folder, tmp_path):
    result = effllm.compress_folder(llama_folder, tmp_path / "out", "uniform-8bit")
    values = json.loads(result.model_dump_json())
    assert Result.model_validate(values) == result
    files = (tmp_path / "out").glob("*.safetensors")
    assert values["stored_bytes"] == sum(file.stat().st_size for file in files)
    assert values["schema_version"] == 1 and values["kl"] is None and len(values["model_digest"]) == 64
    assert 8 < values["bits_per_weight"] < 8.3
    for name in ("perplexity", "kl", "top1_agreement"):
        assert {f"{name}_stderr", f"{name}_tokens"} <= values.keys()


def test_schema_is_shipped():
    shipped = Path(effllm.__file__).parent / "measure" / "result.schema.json"
    assert shipped.read_text() == schema(), "write effllm.measure.result.schema() to the file"


def test_bits_per_weight_of_a_dense_folder(llama_folder):
    assert bits_per_weight(Checkpoint.open(llama_folder)) == 16


def test_eval_measures_a_folder_in_a_fresh_process(llama_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike. " * 30)
    out = tmp_path / "out"
    effllm.compress_folder(llama_folder, out, "uniform-4bit")
    result = effllm.evaluate(out, baseline=llama_folder, text=[str(text)], samples=3, sequence_length=64)
    assert result.kl > 0 and result.kl_tokens == 3 * 63
    assert result.peak_memory_bytes > 50e6 and result.tokens_per_second > 0
    assert result.baseline == str(llama_folder) and result.plan["name"] == "uniform-4bit"


def test_windows_are_spread_and_begin_the_text(tmp_path):
    from conftest import tiny_tokenizer

    path = tmp_path / "text.txt"
    path.write_text("abcdefghij" * 100)
    windows = token_windows(tiny_tokenizer(), [str(path)], samples=4, length=26)
    assert windows.shape == (4, 26) and bool((windows[:, 0] == 0).all())
    flat = token_windows(tiny_tokenizer(), [str(path)], samples=None, length=26)
    assert flat.shape == (40, 26)
    assert all(any(torch.equal(w, f) for f in flat) for w in windows)


def test_weights_share_the_samples_between_sources(tmp_path):
    from conftest import tiny_tokenizer

    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 2000)
    sources = [f"{tmp_path}/a.txt@3", f"{tmp_path}/b.txt"]
    windows = token_windows(tiny_tokenizer(), sources, samples=8, length=16)
    letters = tiny_tokenizer().convert_tokens_to_ids(["a", "b"])
    assert [int((windows[:, 1] == letter).sum()) for letter in letters] == [6, 2]


def test_peak_memory_of_a_run_is_its_own(llama_folder):
    """A large parent does not count into the peak of the process that it starts."""
    from effllm.measure.evaluate import measure_run

    ballast = torch.ones(300_000_000)  # 1.2 GB
    assert measure_run(llama_folder)["peak_memory_bytes"] < 1.0e9 < ballast.nbytes
