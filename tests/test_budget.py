"""A budget: never exceeded, well spent, predicted, and the same whichever door is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_tensors, save, tiny_llama
from families import FAMILIES, inputs_of
from hypothesis import given
from hypothesis import strategies as st

import effllm
from effllm.allocation import solve
from effllm.allocation.footprint import Footprint
from effllm.budget import Budget
from effllm.errors import EffllmError, UsageError
from effllm.measure.evaluate import compare
from effllm.methods.quantize import Quantize
from effllm.plans import load_plan
from effllm.site import Site

DATA = {"samples": 4, "sequence_length": 24}


def plan(**changes: Any) -> dict[str, Any]:
    """A plan of a few options within 4.25 bits per weight."""
    choose = [f"quantize:bits={bits},group_size=64" for bits in (2, 3, 4, 6)]
    return {"budget": "4.25bpw", "calibration": DATA, "steps": [{"sites": ["*"], "choose": choose}], **changes}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save(tiny_llama(initializer_range=0.1), tmp_path_factory.mktemp("budget") / "llama")


def compressed(folder: Path, out: Path, **changes: Any) -> Any:
    return effllm.compress_folder(folder, out, plan(**changes), check=False)


@given(st.floats(0.01, 9999), st.sampled_from(["GB", "MB", "kB", "bpw", "x", " GB", "gb"]))
def test_a_budget_is_read_as_it_is_written(value, unit):
    text = f"{value:.4f}{unit}"
    found = Budget.parse(text)
    scale = {"gb": 1e9, "mb": 1e6, "kb": 1e3}.get(unit.strip().lower(), 1)
    assert found.value == pytest.approx(float(f"{value:.4f}") * scale)


@pytest.mark.parametrize("text", ["", "2", "2 bits", "-1GB", "0GB", "GB", "1e3GB", "4.25 bpw x", "nanGB"])
def test_no_budget_is_refused_in_words(text):
    with pytest.raises(UsageError, match="a budget is written as"):
        Budget.parse(text)


@pytest.mark.parametrize("budget", ["600kB", "0.3x", "3bpw"])
def test_files_stay_within_the_budget_and_use_it(folder, tmp_path, budget):
    result = compressed(folder, tmp_path / "out", budget=budget)
    original = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    spent, limit = result.stored_bytes, {"600kB": 600_000, "0.3x": 0.3 * original}.get(budget)
    if limit is None:
        spent, limit = result.bits_per_weight, 3
    assert 0.9 * limit < spent <= limit
    assert result.predicted_kl is not None and result.predicted_kl > 0


def test_more_is_never_predicted_to_be_worse(folder):
    losses = [effllm.plan(folder, plan(budget=f"{bits}bpw")).predicted_kl for bits in (2.5, 3, 4, 6)]
    assert losses == sorted(losses, reverse=True) and losses[0] > 2 * losses[-1] > 0


def test_below_the_smallest_possible_the_smallest_is_named(folder):
    for budget, words in (("2bpw", r"smallest possible, 2\.\d+bpw"), ("100kB", "smallest possible, 0.")):
        with pytest.raises(UsageError, match=words):
            effllm.plan(folder, plan(budget=budget))


def test_above_the_original_everything_stays_as_it_is(folder, tmp_path):
    compressed(folder, tmp_path / "out", budget="1GB")
    before, after = read_tensors(folder), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(effllm.load(tmp_path / "out").lm_head.weight, effllm.load(folder).lm_head.weight)
    file = tmp_path / "plan.yaml"
    file.write_text(effllm.plan(folder, plan(budget="1GB")).plan.to_yaml())
    effllm.compress_folder(folder, tmp_path / "replayed", file, check=False)
    assert all(torch.equal(tensor, after[name]) for name, tensor in read_tensors(tmp_path / "replayed").items())


@pytest.mark.parametrize("ram", ["4bpw", "0.5x"])
def test_memory_to_run_in_is_bytes(ram):
    with pytest.raises(UsageError, match="3GB or 800MB"):
        load_plan("budget").override(spending={"ram": ram})


def test_work_that_takes_more_than_half_of_what_is_free_is_refused_before_it_begins(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 4_000_000}))
    with pytest.raises(EffllmError, match=r"half of what is free; give --max-memory"):
        compressed(folder, tmp_path / "out")
    effllm.compress_folder(folder, tmp_path / "out", plan(), check=False, max_memory=10**9)


def test_fixed_excluded_and_grouped_layers(folder):
    wanted = load_plan(plan(groups=[["*.gate_proj", "*.up_proj"]])).override(
        ["*.down_proj=quantize:bits=5"], ["model.embed_tokens"]
    )
    steps = effllm.plan(folder, wanted).plan.steps
    given_to = {site: step.use for step in steps for site in step.sites}
    for layer in range(3):
        mlp = f"model.layers.{layer}.mlp"
        assert given_to[f"{mlp}.down_proj"] == Quantize(bits=5)
        assert given_to.get(f"{mlp}.gate_proj") == given_to.get(f"{mlp}.up_proj")
    assert "model.embed_tokens" not in given_to


def test_the_plan_that_a_budget_gives_replays_to_the_byte(folder, tmp_path):
    compressed(folder, tmp_path / "budget")
    file = tmp_path / "plan.yaml"
    file.write_text(effllm.plan(folder, plan()).plan.to_yaml())
    effllm.compress_folder(folder, tmp_path / "replayed", file, check=False)
    one, other = read_tensors(tmp_path / "budget"), read_tensors(tmp_path / "replayed")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("inputs", ["original", "compressed"])
def test_live_and_folder_give_the_same_tensors(folder, tmp_path, inputs):
    compressed(folder, tmp_path / "out", inputs=inputs)
    live = effllm.compress(effllm.load(folder), plan(inputs=inputs))
    live.save_pretrained(tmp_path / "live")
    one, other = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "live")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_prices_are_used_again(folder, tmp_path, monkeypatch):
    first = effllm.plan(folder, plan())
    monkeypatch.setattr("effllm.price.collect.Sweep", None)
    again = effllm.plan(folder, plan(budget="3.5bpw"))
    assert again.predicted_kl > first.predicted_kl
    compressed(folder, tmp_path / "out")


def test_a_killed_pricing_goes_on_to_the_same_prices(folder, monkeypatch, tmp_path):
    whole = effllm.plan(folder, plan()).predicted_kl
    monkeypatch.setenv("EFFLLM_CACHE", str(tmp_path / "cache"))
    from effllm.price import collect

    original, calls = collect._price_gate, []

    def dies_later(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(collect, "_price_gate", dies_later)
    with pytest.raises(KeyboardInterrupt):
        effllm.plan(folder, plan())
    assert effllm.plan(folder, plan()).predicted_kl == whole


def test_without_data_nothing_is_predicted_in_nats(folder, tmp_path):
    found = effllm.plan(folder, plan(effort="fast"))
    assert found.predicted_kl is None and found.bits_per_weight <= 4.25
    result = compressed(folder, tmp_path / "out", effort="fast")
    assert result.predicted_kl is None and result.bits_per_weight <= 4.25


def test_solving_beats_rounding_on_the_same_plan(folder):
    original, kls = effllm.load(folder), {}
    generator = torch.Generator().manual_seed(0)
    seen, unseen = (torch.randint(1, 257, (count, 64), generator=generator) for count in (16, 4))
    for effort in ("fast", "normal"):
        steps = [{"sites": ["blocks"], "use": "quantize:bits=5,group_size=64"}]
        model = effllm.compress(effllm.load(folder), {"effort": effort, "steps": steps}, calibration=seen)
        kls[effort] = compare(model, unseen, original).figures()["kl"]
    assert kls["normal"] < 0.8 * kls["fast"]


@pytest.mark.parametrize("name", ["mixtral", "vit", "resnet", "plain module", "gpt2"])
def test_any_kind_of_model_has_a_budget(name):
    model = FAMILIES[name]()
    inputs = inputs_of(model)
    before = sum(tensor.nbytes for tensor in model.state_dict().values())
    effllm.compress(model, plan(budget="0.5x"), calibration=[inputs])
    after = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    assert sum(after.values()) <= 0.5 * before and model.effllm_report


def test_a_model_that_has_no_logits_is_told_what_to_do():
    with pytest.raises(UsageError, match="--fast"):
        model = FAMILIES["clip"]()
        effllm.compress(model, plan(), calibration=[inputs_of(model)])


def test_layers_that_the_data_never_reach_stay_and_are_named(caplog):
    model = FAMILIES["qwen3_5, images"]()
    effllm.compress(model, plan(budget="0.9x"), calibration=[inputs_of(model)])
    assert "never reached by the calibration data" in caplog.text
    assert not any(name.startswith("model.visual") for name in model.effllm_report)


def test_memory_to_run_in_is_a_budget_too(folder):
    found = effllm.plan(folder, plan(budget=None, ram="3MB", context=64))
    assert found.memory.total <= 3_000_000
    with pytest.raises(UsageError, match="KV cache and scratch"):
        effllm.plan(folder, plan(budget=None, ram="300kB", context=4096))


def test_choices_need_a_budget_and_only_one():
    with pytest.raises(UsageError, match="needs a budget"):
        load_plan(plan(budget=None))
    with pytest.raises(UsageError, match="one budget"):
        load_plan(plan(ram="1GB"))


def test_a_group_without_a_common_codec_is_refused():
    sites = [Site("a.up", (64, 64), "block", "a"), Site("a.gate", (64, 64), "block", "a")]
    choices = {"a.up": [Quantize(bits=2)], "a.gate": [Quantize(bits=3)]}
    with pytest.raises(UsageError, match="no common codec"):
        solve(Budget(8, "bpw"), Footprint(sites, 2, 0, 0), choices, {key: [0.0] for key in choices}, [["*"]])


def test_a_damaged_cache_is_an_error_or_done_again(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("EFFLLM_CACHE", str(tmp_path / "cache"))
    whole = effllm.plan(folder, plan()).predicted_kl
    (journal,) = (tmp_path / "cache").rglob("journal.jsonl")
    journal.write_bytes(journal.read_bytes()[: len(journal.read_bytes()) // 2])
    try:
        assert effllm.plan(folder, plan()).predicted_kl == pytest.approx(whole)
    except EffllmError as error:
        assert str(tmp_path) in str(error)
