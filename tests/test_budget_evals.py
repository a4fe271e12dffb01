"""The evals of budgets run to their tables on a tiny model, and go on where they stopped."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import save, tiny_llama

EVALS = Path(__file__).parent.parent / "evals"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save(tiny_llama(initializer_range=0.1, layers=2, tied=False), tmp_path_factory.mktemp("evals") / "llama")


def script(name: str, monkeypatch, *arguments: object) -> ModuleType:
    """The eval as a module, with a command line to be read."""
    monkeypatch.syspath_prepend(EVALS)
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    spec = importlib.util.spec_from_file_location(name, EVALS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_stages_have_a_row_each_and_lose_less_from_one_to_the_next(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("effllm.train.STEPS", 5)
    out = tmp_path / "stages.json"
    arguments = (folder, "--out", out, "--samples", 4, "--windows", 2, "--budgets", 3, "--threads", 1)
    script("stages", monkeypatch, *arguments).main()
    rows = {(*row["choose"], row["stage"], row["inputs"]): row for row in json.loads(out.read_text())}
    assert len(rows) == 8 and "| quantize, hadamard | learnt | original |" in capsys.readouterr().out
    losses = [rows["quantize", stage, "original"]["kl"] for stage in ("nearest", "feedback", "refined")]
    assert losses == sorted(losses, reverse=True)
    predicted = {key: row["predicted_kl"] for key, row in rows.items()}
    plain = predicted["quantize", "refined", "original"]
    assert len({predicted["quantize", stage, "original"] for stage in ("nearest", "feedback", "refined")}) == 1
    for offered in ("awq", "hadamard"):
        assert 0 < predicted["quantize", offered, "refined", "original"] <= plain, (
            "more to choose from never costs more"
        )
    again = script("stages", monkeypatch, *arguments)
    monkeypatch.setattr(again, "run", None)  # rows that stand are not made again
    again.main()


@pytest.mark.slow
def test_allocation_has_both_tables(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "allocation.json"
    arguments = (folder, "--out", out, "--samples", 4, "--windows", 2, "--matrices", 4, "--tokens", 512)
    script("allocation", monkeypatch, *arguments).main()
    found = json.loads(out.read_text())
    assert {row["bits"] for row in found["singles"]} == {3, 4} and len(found["singles"]) >= 8
    sizes = {row["plan"]: row["bits_per_weight"] for row in found["plans"]}
    assert sizes["per matrix, bytes of uniform 3"] <= sizes["uniform 3 bits"]
    assert "rank correlation" in capsys.readouterr().out and out.with_suffix(".md").exists()


@pytest.mark.slow
def test_an_exchange_measures_changes_and_its_own_result(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "exchange.json"
    arguments = (folder, "--out", out, "--samples", 4, "--windows", 1, 2, "--every", 3)
    script("exchange", monkeypatch, *arguments).main()
    found = json.loads(out.read_text())
    assert found["kl"] > 0 and found["kl_exchanged"] - found["kl"] == pytest.approx(found["difference"])
    for row in found["changes"]:
        assert row["from"] != row["to"] and row["expected"] != 0
    assert {row["expected"] > 0 for row in found["changes"]} == {True, False}
    assert "rank_correlation" in capsys.readouterr().out


@pytest.mark.slow
def test_a_block_diagonal_metric_is_compared_with_the_whole_one(folder, tmp_path, monkeypatch):
    out = tmp_path / "block_diagonal.json"
    script("block_diagonal", monkeypatch, folder, "--out", out, "--samples", 2, "--width", 32).main()
    found = json.loads(out.read_text())
    assert found["matrices"] > 0 and found["3 bits"]["rank_correlation"] > 0.5
    whole, runs = found["expected_kl"]["whole"], found["expected_kl"]["block-diagonal"]
    assert runs > 0.999 * whole > 0, "the best by other prices is no better by these"
