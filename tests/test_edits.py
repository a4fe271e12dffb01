"""The contract of every edit: it comes off without a trace, works on meta, and travels in a plan and a saved folder."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import edit_config, tiny_llama
from families import FAMILIES, inputs_of, outputs_of
from torch import nn

import effllm
from effllm.errors import EffllmError, UsageError
from effllm.method import Edit
from effllm.plans import load_plan
from effllm.registry import methods

EDITS = [name for name, cls in methods().items() if issubclass(cls, Edit)]
HOSTS = ["llava", "qwen2_vl", "llama", "vit", "mixtral"]


def hosts(name: str) -> list[str]:
    """The families that take the edit with its default settings."""
    found = []
    for family in HOSTS:
        try:
            effllm.apply(FAMILIES[family](), methods()[name]()).remove()
            found.append(family)
        except EffllmError as error:
            assert len(str(error)) > 40, "a refusal says why"
    return found


def trace(model: nn.Module) -> list[object]:
    """What an edit could leave behind: attributes, submodules and hooks."""
    found: list[object] = []
    for name, module in model.named_modules():
        found += [name, sorted(module.__dict__), len(module._forward_pre_hooks), len(module._forward_hooks)]
    return found


@pytest.mark.parametrize("name", EDITS)
def test_it_comes_off_without_a_trace(name):
    assert hosts(name), f"{name} acts on none of {HOSTS}"
    for family in hosts(name):
        model = FAMILIES[family]()
        inputs = inputs_of(model)
        plain, before = outputs_of(model, inputs), trace(model)
        with effllm.apply(model, methods()[name]()) as handle:
            assert trace(model) != before
            outputs_of(model, inputs)
        handle.remove()
        assert trace(model) == before and torch.equal(outputs_of(model, inputs), plain)


@pytest.mark.parametrize("name", EDITS)
def test_it_goes_onto_a_model_without_weights(name):
    model = FAMILIES[hosts(name)[0]]().to("meta")
    effllm.apply(model, methods()[name]()).remove()


@pytest.mark.parametrize("name", EDITS)
def test_a_plan_carries_it_into_the_folder_and_back(name, tmp_path):
    for family in hosts(name):
        model = FAMILIES[family]()
        inputs = inputs_of(model)
        model.save_pretrained(tmp_path / family / "original")
        plan = {"steps": [{"sites": ["blocks"], "use": "quantize:bits=8"}, {"apply": name}]}
        effllm.compress(model, plan)
        expected = outputs_of(model, inputs)
        model.save_pretrained(tmp_path / family / "live")
        effllm.compress_folder(tmp_path / family / "original", tmp_path / family / "out", plan)
        for folder in ("live", "out"):
            loaded = effllm.load(tmp_path / family / folder)
            assert torch.equal(outputs_of(loaded, inputs), expected)
            methods()[name]().detach(loaded)
            assert not torch.equal(outputs_of(loaded, inputs), expected), "the edit changes nothing"


def test_a_plan_may_be_an_edit_alone(tmp_path):
    model = FAMILIES["llava"]()
    inputs = inputs_of(model)
    model.save_pretrained(tmp_path / "original")
    plan = {"steps": [{"apply": {"pyramiddrop": {"ratios": [0.25], "layers": [1]}}}]}
    effllm.compress_folder(tmp_path / "original", tmp_path / "out", plan)
    with effllm.apply_pyramiddrop(model, ratios=(0.25,), layers=(1,)):
        assert torch.equal(outputs_of(effllm.load(tmp_path / "out"), inputs), outputs_of(model, inputs))
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert [edit["method"] for edit in config["edits"]] == ["pyramiddrop"] and config["sites"] == []


def test_plans_with_edits_survive_yaml():
    plan = load_plan({"steps": [{"apply": "pyramiddrop:budget=0.33"}, {"sites": ["*"], "use": "quantize"}]})
    import yaml

    assert load_plan(yaml.safe_load(plan.to_yaml())) == plan
    assert [edit.label() for edit in plan.edits()] == ["pyramiddrop:stages=4,budget=0.33"]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"apply": "pyramiddrop", "sites": ["*"]}, "such a step has no other key"),
        ({"apply": "pyramiddrop", "use": "quantize"}, "such a step has no other key"),
        ({"apply": "quantize"}, "quantize is no edit: it is a codec"),
        ({"apply": "pyramiddrop:ratio=2"}, "ratio = '2'"),
        ({"use": "quantize"}, "a step needs 'sites'"),
    ],
)
def test_bad_steps_are_refused(step, message):
    with pytest.raises(UsageError, match=message):
        load_plan({"steps": [step]})


def test_an_edit_that_does_not_fit_is_refused_before_any_work(tmp_path):
    plan = {"steps": [{"sites": ["*"], "use": "quantize"}, {"apply": "pyramiddrop"}]}
    model = tiny_llama()
    with pytest.raises(EffllmError, match="PyramidDrop cannot act on LlamaForCausalLM"):
        effllm.compress(model, plan)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    model.save_pretrained(tmp_path / "original")
    with pytest.raises(EffllmError, match="PyramidDrop cannot act on LlamaForCausalLM"):
        effllm.compress_folder(tmp_path / "original", tmp_path / "out", plan)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([{"method": "nothing", "settings": {}}], "unknown edit 'nothing'"),
        ([{"method": "pyramiddrop", "settings": {"ratio": 7}}], "ratio"),
        ([{"method": "quantize", "settings": {}}], "quantize is no edit: it is a codec"),
        (["pyramiddrop"], "an edit needs method and settings"),
        ("pyramiddrop", "is no list"),
    ],
)
def test_edits_of_a_damaged_config_are_refused(edits, message, tmp_path):
    model = effllm.compress(FAMILIES["llava"](), "uniform-8bit")
    model.save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    edit_config(tmp_path / "out", quantization_config=config | {"edits": edits})
    with pytest.raises(EffllmError, match=message):
        effllm.load(tmp_path / "out")
