"""The parts of `evals/peers.py` that need no peer: counting bits, the table, the paired difference, resuming."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

EVALS = Path(__file__).parent.parent / "evals"


def imported(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


peers = imported(EVALS / "peers.py", "peers_eval")
common = imported(EVALS / "peer_quantizers" / "common.py", "peers_common")


def row(name: str, bits: float, kls: list[float], **more: Any) -> dict[str, Any]:
    figures = {"kl": sum(kls) / len(kls), "kl_stderr": 0.01, "perplexity": 50.0, "perplexity_stderr": 1.0}
    agreement = {"top1_agreement": 0.75, "top1_agreement_stderr": 0.01}
    cost = {"seconds": 1.0, "cpu_seconds": 2.0, "peak_memory_bytes": 1e9}
    return {"name": name, "bits": bits, "window_kl": kls, **figures, **agreement, **cost, **more}


def test_bits_count_groups_and_padding() -> None:
    assert common.grouped_bits((2, 128), 4, 64, 32) == 2 * 128 * 4.5
    assert common.grouped_bits((1, 65), 4, 64, 32) == 2 * (64 * 4 + 32)
    assert common.stored_bits(torch.zeros(3, dtype=torch.int16), None, torch.zeros(2, dtype=torch.uint8)) == 64


def test_identity_reads_the_weight() -> None:
    layer = torch.nn.Linear(5, 3, bias=False)
    assert torch.allclose(common.read_weight(layer, 5), layer.weight)


def test_dense_folder_keeps_what_was_not_compressed(tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    (model / "config.json").write_text("{}")
    save_file({"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2)}, model / "model.safetensors")
    common.write_dense(model, out, {"a": torch.full((2, 2), 0.5)})
    written = load_file(out / "model.safetensors")
    assert written["a.weight"].dtype == torch.bfloat16 and written["a.weight"].eq(0.5).all()
    assert written["b.weight"].eq(1).all() and (out / "config.json").exists()
    with pytest.raises(ValueError, match=r"no tensor c\.weight"):
        common.write_dense(model, out, {"c": torch.ones(1)})


def test_table_is_sorted_and_paired() -> None:
    rows = [row("big", 4.5, [1.0, 3.0]), row("small", 2.0, [4.0, 4.0]), {"name": "gone", "error": "no wheel"}]
    rows += [row("effllm", 4.0, [0.5, 2.5], budget=4.0)]
    lines = peers.table(rows).splitlines()[2:]
    assert [line.split(" | ")[1] for line in lines[:3]] == ["small", "effllm", "big"]
    assert "-0.5000 ± 0.0000 (4.000 bits)" in lines[2] and "failed: no wheel" in lines[3]


def test_rows_that_stand_are_skipped_and_failures_tried_again(tmp_path: Path) -> None:
    bench = object.__new__(peers.Bench)
    bench.out, bench.setting, bench.rows = tmp_path / "peers.json", {"samples": 1}, []
    calls: list[str] = []

    def work(outcome: str) -> dict[str, Any]:
        calls.append(outcome)
        if outcome == "fails":
            raise peers.Failed("no wheel")
        return {"bits": 4.0}

    for outcome in ("fails", "works", "works"):
        bench.add("peer", {"settings": {"bits": 4}}, lambda outcome=outcome: work(outcome))
    assert calls == ["fails", "works"]
    assert peers.read_rows(bench.out, bench.setting) == [{"name": "peer", "settings": {"bits": 4}, "bits": 4.0}]
    assert json.loads(bench.out.read_text())["samples"] == 1
    bench.add("peer", {"settings": {"bits": 3}}, lambda: work("works"))
    assert len(calls) == 3
    with pytest.raises(SystemExit, match="other text"):
        peers.read_rows(bench.out, {"samples": 2})


def test_plot_of_stored_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    peers.plot([row("big", 4.5, [1.0]), row("effllm", 4.0, [0.5], budget=4.0)], tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size
