"""Compressing while `from_pretrained` reads: equal to compressing afterwards, and refused where it cannot be."""

from __future__ import annotations

import pytest
import torch
from conftest import read_tensors, tiny_llama
from families import FAMILIES, inputs_of, outputs_of
from transformers import AutoModelForCausalLM

import effllm
from effllm.errors import UsageError
from effllm.layers import CodecModule


@pytest.mark.parametrize(
    "family", ["llama", "llama, untied", "gpt2", "mixtral", "gpt_oss", "whisper", "resnet", "llava"]
)
def test_on_load_gives_what_compressing_afterwards_gives(family, tmp_path):
    model = FAMILIES[family]()
    model.save_pretrained(tmp_path / "original")
    quantized = type(model).from_pretrained(
        tmp_path / "original", quantization_config=effllm.Config(plan="uniform-4bit")
    )
    afterwards = effllm.compress(type(model).from_pretrained(tmp_path / "original"), "uniform-4bit")
    inputs = inputs_of(model)
    expected = outputs_of(afterwards, inputs)
    assert torch.equal(outputs_of(quantized, inputs), expected)
    quantized.save_pretrained(tmp_path / "on_load")
    afterwards.save_pretrained(tmp_path / "afterwards")
    one, other = read_tensors(tmp_path / "on_load"), read_tensors(tmp_path / "afterwards")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(outputs_of(effllm.load(tmp_path / "on_load"), inputs), expected)


def test_a_plan_may_be_a_file_a_dictionary_or_a_plan(llama_folder, tmp_path):
    steps = {"steps": [{"sites": ["*.up_proj"], "use": "quantize:bits=8"}]}
    (tmp_path / "up.yaml").write_text(effllm.Plan(**steps).to_yaml())
    for plan in (steps, effllm.Plan(**steps), tmp_path / "up.yaml", str(tmp_path / "up.yaml")):
        model = AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=effllm.Config(plan=plan))
        assert sum(isinstance(module, CodecModule) for module in model.modules()) == 3


@pytest.mark.parametrize("plan", ["layerwise-4bit", None])
def test_a_plan_that_cannot_be_carried_out_while_loading_is_refused(plan, llama_folder):
    with pytest.raises(UsageError, match=r"cannot be known while loading|needs a plan"):
        AutoModelForCausalLM.from_pretrained(llama_folder, quantization_config=effllm.Config(plan=plan))


def test_a_packed_folder_keeps_its_own_plan(tmp_path, tokens):
    model = effllm.compress(tiny_llama(), "uniform-8bit")
    model.save_pretrained(tmp_path / "out")
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", quantization_config=effllm.Config(plan="uniform-4bit")
        )
    assert torch.equal(again(tokens).logits, model(tokens).logits)
