"""`evals/layerwise.py` on a tiny random model: the rows are there, and say what effllm itself says."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import save, tiny_llama

import effllm
from effllm.checkpoint import Checkpoint
from effllm.data.inputs import calibration_batches
from effllm.measure.evaluate import compare
from effllm.measure.result import Result, bits_per_weight
from effllm.plans import Calibration, load_plan
from effllm.resume import RunJournal


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    path = Path(__file__).parent.parent / "evals" / "layerwise.py"
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location("layerwise_eval", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(path.parent))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save(tiny_llama(layers=4), tmp_path_factory.mktemp("eval") / "tiny")


def measure(script: ModuleType, folder: Path, out: Path, monkeypatch) -> list[dict]:
    monkeypatch.setattr(sys, "argv", ["layerwise.py", str(folder), "--out", str(out), "--quick"])
    script.main()
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def results(script, folder, tmp_path_factory) -> tuple[Path, list[dict]]:
    out = tmp_path_factory.mktemp("results") / "layerwise.json"
    with pytest.MonkeyPatch.context() as patch:
        return out, measure(script, folder, out, patch)


def test_every_table_has_its_rows(results):
    out, rows = results
    main = [row["variant"] for row in rows if row["table"] == "main"]
    assert main[:4] == ["original", "uniform 8", "uniform 4", "uniform 3"]
    for lowered in (1, 2):
        for order in ("LIM", "LIM, a vector a text", "ZD", "reversed LIM", "random, mean of 3"):
            assert f"4/2, {lowered} of 4 at 2: {order}" in main
        assert sum(f"4/2, {lowered} of 4 at 2: random, seed" in name for name in main) == 3
    assert {row["dropped"] for row in rows if row["table"] == "drop"} == {0, 1, 2}
    swept = [row for row in rows if row["table"] == "sweep"]
    assert {row["order"] for row in swept} == {
        "", "lim", "random", "random:seed=0", "random:seed=1", "random:seed=2"
    }  # fmt: skip
    assert all(isinstance(row["within_limits"], bool) for row in swept if row["lowered"] not in (0, 4))
    text = out.with_suffix(".md").read_text()
    assert "Widths and orders" in text and "| 8/4 |" in text and "| 4/2 |" in text


def test_rows_carry_the_keys_of_a_result(results):
    for row in results[1]:
        Result.model_validate({key: value for key, value in row.items() if key in Result.model_fields})
        assert {"perplexity", "perplexity_stderr", "kl", "kl_stderr", "kl_tokens", "top1_agreement", "stored_bytes",
                "bits_per_weight", "machine", "versions", "seed"} <= row.keys()  # fmt: skip
    original = results[1][0]
    assert (original["kl"], original["top1_agreement"], original["bits_per_weight"]) == (0, 1, 16)
    compared = [row for row in results[1] if row["order"] not in ("", "lim")]
    assert compared and all("nll_minus_lim_stderr" in row for row in compared)


def test_a_row_equals_what_effllm_says_of_the_same_plan(results, script, folder, tmp_path):
    row = next(r for r in results[1] if r["variant"] == "4/2, 2 of 4 at 2: LIM" and r["table"] == "main")
    batches = calibration_batches(Calibration(samples=2, sequence_length=64), effllm.data.text.load_tokenizer(folder))
    tokens = torch.cat([batch["input_ids"] for batch in batches])
    model = effllm.load(folder)
    packed = effllm.compress(copy.deepcopy(model), load_plan(row["plan"]), calibration=tokens)
    windows = effllm.data.text.token_windows(
        effllm.data.text.load_tokenizer(folder), ["default"], 2, 64, packaged=effllm.data.text.EVALUATION_TEXTS
    )
    figures = compare(packed, windows, baseline=model).figures()
    for key in ("perplexity", "kl", "kl_stderr", "top1_agreement"):
        assert row[key] == pytest.approx(figures[key], rel=1e-3, abs=1e-5)
    packed.save_pretrained(tmp_path / "packed")
    assert row["bits_per_weight"] == pytest.approx(bits_per_weight(Checkpoint.open(tmp_path / "packed")), rel=1e-9)


def test_the_same_command_goes_on_from_finished_windows(results, script, folder, monkeypatch):
    out, rows = results
    journal = out.with_suffix(".partial") / "journal.jsonl"
    lines = [line for line in journal.read_text().splitlines() if line]
    assert sum('"kind": "window"' in line for line in lines) == 2
    journal.write_text("\n".join([*lines[:-1], lines[-1][:50]]))  # killed while writing the last window
    measured = []
    monkeypatch.setattr(script, "measure", lambda *given, own=script.measure: measured.append(1) or own(*given))
    assert measure(script, folder, out, monkeypatch) == rows
    assert len(measured) == 1


@torch.no_grad()
def test_a_dropped_block_is_the_identity_and_comes_back(script, tmp_path):
    model = tiny_llama(layers=3)
    calibration = torch.arange(32).view(2, 16)
    rows = script.variants(3, 64, quick=True)
    bench = script.Bench(model, rows, calibration, 64, RunJournal(tmp_path / "out.partial", "key"))
    dropped = next(row for row in rows if row.dropped == 1 and row.pair == (8, 8))
    before = model(input_ids=calibration).logits
    with bench.applied(dropped) as changed:
        states = changed(input_ids=calibration, output_hidden_states=True).hidden_states
    gone = bench.source.blocks.index(bench.least[0])
    assert gone == 2 or torch.equal(states[gone], states[gone + 1])  # the last state is normed
    assert torch.equal(model(input_ids=calibration).logits, before)
    whole = next(row for row in rows if row.pair == (8, 8) and not row.dropped)
    assert bench.nbytes(dropped) * 3 == bench.nbytes(whole) * 2
