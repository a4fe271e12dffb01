"""`evals/pyramiddrop.py` at a tiny size: its counts are those of a count by hand. No time is asserted."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from effllm.methods.pyramiddrop import SCORERS

TOKENS, LAYERS, WIDTH = 36, 4, 64


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parent.parent / "evals" / "pyramiddrop.py"
    spec = importlib.util.spec_from_file_location("pyramiddrop_eval", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def document(script, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("results") / "pyramiddrop.json"
    sizes = ["--tokens", str(TOKENS), "--layers", str(LAYERS), "--width", str(WIDTH), "--repeats", "2", "--steps", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pyramiddrop.py", *sizes, "--out", str(out)])
        patch.setattr(script, "peak", script.added_peak)  # a fresh process takes seconds to import transformers
        patch.setattr(script.torch, "set_num_threads", lambda count: None)
        patch.setattr(script, "VARIANTS", dict(script.VARIANTS))
        patch.setitem(SCORERS, "timed", None)
        script.main()
    table = out.with_suffix(".md").read_text()
    assert f"| | {TOKENS} visual tokens |" in table and "nan" not in table
    return json.loads(out.read_text())


def flops(script: ModuleType, lengths: list[int]) -> int:
    """Of decoder layers that see `lengths` tokens, the tower, the projector and one row of logits."""
    inner, tower, patches = WIDTH * 43 // 16, WIDTH // 4, TOKENS + 1
    decoder = sum(n * (4 * WIDTH**2 + 3 * WIDTH * inner) + 2 * n * n * WIDTH for n in lengths)
    layer = patches * (4 * tower**2 + 2 * tower * WIDTH) + 2 * patches**2 * tower
    pixels = TOKENS * tower * 3 * script.PATCH**2
    projector = TOKENS * (tower * WIDTH + WIDTH**2)
    return 2 * (decoder + LAYERS * 3 // 4 * layer + pixels + projector + WIDTH * script.VOCABULARY)


def test_flops_and_bytes_are_those_of_the_tokens_that_each_layer_sees(script, document):
    (row,) = document["results"]
    kept = [script.TEXT + TOKENS // 2**stage for stage in range(4)]
    assert row["schedule"] == {"1": 0.5, "2": 0.25, "3": 0.125}
    assert row["flops"]["dense"]["full"] == row["flops"]["keep all"]["full"] == flops(script, kept[:1] * 4)
    assert row["flops"][script.RANDOM]["full"] == flops(script, kept)
    assert flops(script, kept) < row["flops"]["pyramid"]["full"] < row["flops"]["dense"]["full"]
    assert row["flops"]["dense"]["causal"] < row["flops"]["dense"]["full"]
    assert row["flops_ratio"]["full"] == pytest.approx(
        flops(script, kept) / flops(script, kept[:1] * 4) + row["ranking_flops_share"]
    )
    assert row["kv_bytes_per_layer"]["pyramid"] == [2 * 4 * WIDTH * length for length in kept]
    assert row["kv_ratio"] == row["kv_ratio_of_schedule"] == sum(kept) / (4 * kept[0])


def test_every_variant_is_timed(script, document):
    (row,) = document["results"]
    assert set(row["prefill_ms"]) == set(row["decode_ms"]) == set(script.VARIANTS)
    for name in ("prefill_ratio", "keep_all_ratio", "decode_ratio"):
        assert set(row[name]) == {"median", "min", "wall_median"} and all(value > 0 for value in row[name].values())
    assert row["ranking_ms"] > 0 and set(row["prefill_peak_bytes"]) == {"dense", "pyramid"}
    assert set(document["hooks"]) == {"no padding", "a padded batch of 2"}
    assert document["settings"]["repeats"] == 2 and document["machine"] and document["versions"]
