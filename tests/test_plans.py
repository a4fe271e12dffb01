"""Plans: reading, overriding, choosing."""

from __future__ import annotations

import pytest
from conftest import tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from effllm.errors import UsageError
from effllm.journal import codecs, entries
from effllm.methods.lim import Lim
from effllm.methods.quantize import Quantize
from effllm.methods.random import Random
from effllm.plans import Plan, Step, load_plan, presets
from effllm.registry import from_spec
from effllm.site import find_sites, select

SITES = find_sites(tiny_llama(tied=False, layers=8))
LAYERWISE = {
    "sites": ["blocks"],
    "order": "lim",
    "high": "quantize:bits=8",
    "low": "quantize:bits=4",
    "average_bits": 4.5,
}
bits = st.integers(2, 8)
quantizers = st.builds(
    Quantize,
    bits=bits,
    group_size=st.sampled_from([32, 64, 128, "row"]),
    symmetric=st.booleans(),
    range=st.sampled_from(["minmax", "search"]),
)


@pytest.mark.parametrize("name", list(presets()))
def test_presets_cover_every_matrix(name):
    plan = load_plan(name)
    assert plan.name == name and plan.description
    assert set(plan.options(SITES)) == {site.name for site in SITES}


def test_layerwise_presets_give_the_stated_averages():
    for name, average, high in (("layerwise-4bit", 4.5, 1), ("layerwise-3bit", 3.0, 4)):
        plan = load_plan(name)
        ranks = {score: {f"model.layers.{i}": float(-i) for i in range(8)} for score in plan.scores()}
        assigned = plan.assign(SITES, ranks)
        widths = [assigned[f"model.layers.{i}.mlp.up_proj"].bits for i in range(8)]
        assert sum(widths) / 8 == average
        assert widths == sorted(widths, reverse=True) and widths.count(max(widths)) == high
        assert assigned["model.embed_tokens"].bits == assigned["lm_head"].bits == 8


@given(
    st.lists(quantizers, min_size=1, max_size=4), st.lists(st.sampled_from(["blocks", "*.mlp.*", "head"]), min_size=1)
)
@settings(max_examples=50, deadline=None)
def test_yaml_round_trip_is_exact(tmp_path_factory, methods, patterns):
    plan = Plan(name="x", exclude=["lm_head"], steps=[Step(sites=patterns, use=method) for method in methods])
    path = tmp_path_factory.mktemp("plans") / "x.yaml"
    path.write_text(plan.to_yaml())
    assert load_plan(path) == plan


def test_layerwise_yaml_round_trip(tmp_path):
    plan = load_plan("layerwise-4bit").override(score="random:seed=3", samples=8)
    (tmp_path / "plan.yaml").write_text(plan.to_yaml())
    assert load_plan(tmp_path / "plan.yaml") == plan


@given(bits, bits, st.floats(2, 8), st.integers(1, 96))
@settings(max_examples=200, deadline=None)
def test_high_blocks_never_exceed_the_average(low, high, average, blocks):
    if not low < high or not low <= average <= high:
        return
    step = Step.model_validate(
        LAYERWISE | {"high": Quantize(bits=high), "low": Quantize(bits=low), "average_bits": average}
    )
    count = step.high_blocks(blocks)
    mean = (count * high + (blocks - count) * low) / blocks
    assert mean <= average + 1e-6
    assert count == blocks or ((count + 1) * high + (blocks - count - 1) * low) / blocks > average - 1e-6


def test_the_important_blocks_get_the_high_width():
    plan = Plan.model_validate({"steps": [LAYERWISE | {"average_bits": 5}]})
    rank = {f"model.layers.{i}": float(i == 3 or i == 6) for i in range(8)}
    assigned = plan.assign(SITES, {Lim(): rank})
    assert {name.split(".")[2] for name, codec in assigned.items() if codec.bits == 8} == {"3", "6"}


def test_later_steps_decide_and_overrides_come_last():
    plan = load_plan("uniform-4bit").override(["*.down_proj=quantize:bits=6,group_size=32"], ["model.layers.0.*"])
    assigned = plan.assign(SITES, {})
    assert assigned["model.layers.1.mlp.down_proj"] == Quantize(bits=6, group_size=32)
    assert assigned["lm_head"].bits == 8
    assert not [name for name in assigned if name.startswith("model.layers.0.")]


def test_score_override_replaces_every_ordering():
    plan = load_plan("layerwise-3bit").override(score="random:seed=2")
    assert plan.scores() == [Random(seed=2)] and not plan.needs_data
    with pytest.raises(UsageError, match="orders nothing"):
        load_plan("uniform-4bit").override(score="zd")


def test_words_globs_and_ties():
    tied = find_sites(tiny_llama())
    assert select(["head"], tied) == []
    assert [site.name for site in select(["lm_head"], tied)] == ["model.embed_tokens"]
    assert {site.role for site in select(["blocks"], SITES)} == {"block"}


@given(st.dictionaries(st.sampled_from([site.name for site in SITES]), quantizers, min_size=1))
@settings(max_examples=100, deadline=None)
def test_journal_round_trip_is_exact(assigned):
    assert codecs(entries(assigned)) == assigned


def test_the_journal_of_twelve_thousand_experts_is_two_patterns():
    names = [f"model.layers.{i}.experts.{p}.{e}" for i in range(48) for p in ("up", "down") for e in range(128)]
    journal = entries({name: Quantize() for name in names})
    assert [entry["sites"] for entry in journal] == [
        ["model.layers.{0-47}.experts.up.{0-127}", "model.layers.{0-47}.experts.down.{0-127}"]
    ]
    assert list(codecs(journal)) != [] and codecs(journal).keys() == set(names)


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("ab"), st.integers(0, 9)), min_size=1, unique=True))
@settings(max_examples=100, deadline=None)
def test_patterns_of_blocks_and_experts_stand_for_exactly_their_sites(places):
    assigned = {f"blocks.{i}.{p}.{e}": Quantize() for i, p, e in places}
    assert codecs(entries(assigned)) == assigned


def test_specs():
    assert from_spec("quantize:bits=6,group_size=row") == Quantize(bits=6, group_size="row")
    assert from_spec({"quantize": {"bits": 3, "symmetric": True}}) == Quantize(bits=3, symmetric=True)
    assert from_spec("quantize") == Quantize()
