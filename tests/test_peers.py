"""The parts of `evals/peers.py` that need no peer: counting and reading bits, measuring, the table, resuming."""

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
from transformers import AutoModelForCausalLM

from effllm.checkpoint import resolve
from effllm.measure.evaluate import compare

EVALS = Path(__file__).parent.parent / "evals"


def imported(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(EVALS))
peers = imported(EVALS / "peers.py", "peers_eval")
reference = sys.modules["peer_quantizers.reference"]
report = sys.modules["peer_quantizers.report"]
common = imported(EVALS / "peer_quantizers" / "common.py", "peers_common")


def row(name: str, bits: float, kls: list[float], **more: Any) -> dict[str, Any]:
    figures = {"kl": sum(kls) / len(kls), "kl_stderr": 0.01, "perplexity": 50.0, "perplexity_stderr": 1.0}
    agreement = {"top1_agreement": 0.75, "top1_agreement_stderr": 0.01}
    cost = {"seconds": 1.0, "cpu_seconds": 2.0, "peak_memory_bytes": 1e9}
    return {"name": name, "bits": bits, "window_kl": kls, **figures, **agreement, **cost, **more}


def packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes `[n, columns]` one after another in int32 words, lowest bits first, as GPTQ's checkpoints hold them."""
    columns = []
    for column in codes.t().tolist():
        stream = sum(code << (bits * place) for place, code in enumerate(column))
        words = [(stream >> shift) & 0xFFFFFFFF for shift in range(0, bits * len(column), 32)]
        columns.append([word - (1 << 32) if word >> 31 else word for word in words])
    return torch.tensor(columns, dtype=torch.int32).t().contiguous()


def test_stored_bits() -> None:
    assert common.stored_bits(torch.zeros(3, dtype=torch.int16), None, torch.zeros(2, dtype=torch.uint8)) == 64


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_checkpoints_of_gptq_are_read_and_counted(bits: int, act_order: bool) -> None:
    rows, columns, group = 32, 64, 32
    codes, zeros = torch.randint(2**bits, (columns, rows)), torch.randint(1, 2**bits, (columns // group, rows))
    scales = torch.rand(columns // group, rows).half()
    groups = torch.arange(columns) // group
    stored = {"qweight": packed(codes, bits), "qzeros": packed(zeros.t() - 1, bits).t(), "scales": scales}
    if act_order:
        groups = groups.flip(0)
        stored["g_idx"] = groups.int()
    found = common.gptq_layer(stored, columns, zero_offset=1)
    assert torch.equal(found.weight, ((codes - zeros[groups]) * scales.float()[groups]).t())
    parts = rows * columns * bits + 2 * rows * (bits + 16) + 32 * columns * act_order
    assert found.bits == parts


def test_only_a_layers_own_tensors_are_counted() -> None:
    tensors = {"a.1.x": torch.zeros(1), "a.10.x": torch.zeros(1), "a.1.y.z": torch.zeros(1)}
    assert common.of_layer(tensors, "a.1").keys() == {"x", "y.z"}


def test_kept_reference_gives_what_both_models_give(tmp_path: Path) -> None:
    original, changed = (
        AutoModelForCausalLM.from_pretrained(resolve("demo"), dtype=torch.float32).eval() for _ in range(2)
    )
    generator = torch.Generator().manual_seed(0)
    for name, weight in changed.named_parameters():
        if ".layers." in name:
            weight.data += 0.05 * weight.std() * torch.randn(weight.shape, generator=generator)
    windows = torch.randint(original.config.vocab_size, (2, 150), generator=generator)
    kept = reference.Reference(original, windows, tmp_path / "kept.safetensors", "key")
    found, expected = kept.compare(changed), compare(changed, windows, original)
    for name in ("nll", "baseline_nll", "kl", "agreement"):
        assert torch.allclose(getattr(found, name), getattr(expected, name), atol=2e-5), name
    assert found.tokens == expected.tokens and expected.kl is not None and expected.kl.min() > 1e-3
    again = reference.Reference(original, windows, tmp_path / "kept.safetensors", "key").compare(original)
    assert again.kl.abs().max() < 1e-5 and again.agreement.eq(1).all()
    changed.get_output_embeddings().weight.data += 1
    with pytest.raises(ValueError, match="head was changed"):
        kept.compare(changed)


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
    lines = report.table(rows).splitlines()[2:]
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
    other = tmp_path / "other.json"
    rows = [{"name": "peer", "bits": 2.0}, {"name": "more", "bits": 1.0}, {"name": "gone", "error": "no wheel"}]
    other.write_text(json.dumps({"samples": 1, "rows": rows}))
    bench.take_over([other])
    assert peers.read_rows(bench.out, bench.setting) == rows[:2]


def test_plot_of_stored_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.plot([row("big", 4.5, [1.0]), row("effllm", 4.0, [0.5], budget=4.0)], tmp_path / "peers.png")
    assert (tmp_path / "peers.png").stat().st_size
