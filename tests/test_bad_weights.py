"""Configs and weights that cannot be right are refused; unusual ones are not."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from conftest import edit_config, read_tensors, save, tiny_llama
from damage import EMBEDDING, EVERYTHING, MATRIX, NORM, PLAN, compress_refusal, refusal, rewrite, says
from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

import effllm
from effllm.errors import UsageError
from effllm.registry import from_spec


@pytest.mark.parametrize(
    ("changes", "parts"),
    {
        "unknown class": (
            {"architectures": ["NopeForCausalLM"]},
            ["'NopeForCausalLM'", "upgrade transformers", "effllm.compress(model)"],
        ),
        "unknown type": ({"model_type": "nope"}, ["'nope'", "upgrade transformers", "effllm.compress(model)"]),
        "no type": ({"model_type": None}, ["no model_type"]),
        "no class": ({"architectures": None}, ["'architectures'", "such as LlamaForCausalLM"]),
        "class is a number": ({"architectures": 5}, ["'architectures'", "such as LlamaForCausalLM"]),
        "class is an object": ({"architectures": {"a": 1}}, ["'architectures'", "such as LlamaForCausalLM"]),
        "width is a word": ({"hidden_size": "wide"}, ["LlamaForCausalLM", "hidden_size", "'wide'"]),
        "negative width": ({"hidden_size": -4}, ["LlamaForCausalLM", "-4"]),
        "heads": ({"num_attention_heads": 3}, ["LlamaForCausalLM", "256", "attention heads (3)"]),
        "activation": ({"hidden_act": "nope"}, ["LlamaForCausalLM", "nope"]),
        "integer dtype": ({"dtype": "int8"}, ["config.json", "'int8'", "no float dtype"]),
        "unknown dtype": ({"dtype": "nope"}, ["config.json", "'nope'", "no float dtype"]),
        "text_config": ({"text_config": "x"}, ["config.json", "text_config = 'x'"]),
        "quantization_config": ({"quantization_config": "x"}, ["config.json", "quantization_config = 'x'"]),
        "other shapes": ({"intermediate_size": 400}, ["down_proj", "[256, 384]", "config.json describes [256, 400]"]),
        "more layers": ({"num_hidden_layers": 2}, ["lacks model.layers.1."]),
    }.values(),
)
def test_config(folder, changes, parts):
    edit_config(folder, **changes)
    says(refusal(effllm.plan, folder, PLAN), *parts)
    says(compress_refusal(folder), *parts)
    says(refusal(effllm.load, folder), *parts)


@pytest.mark.parametrize("content", ["", "{", "[]", "5", "\xff", "[" * 100_000])
def test_config_that_is_no_object(folder, content):
    (folder / "config.json").write_text(content, encoding="latin-1")
    says(compress_refusal(folder), folder / "config.json", "JSON")


def test_folder_without_config(folder):
    (folder / "config.json").unlink()
    says(compress_refusal(folder), folder, "no config.json", "name a Hugging Face model folder")


@pytest.mark.parametrize("name", [MATRIX, NORM, EMBEDDING, "model.layers.0.input_layernorm.weight"])
def test_weight_that_lacks(folder, name):
    rewrite(folder, **{name.replace(".", "__"): None})
    says(refusal(effllm.plan, folder, PLAN), folder, f"lacks {name}")
    says(refusal(effllm.load, folder), folder, "lacks")
    says(compress_refusal(folder), folder, f"lacks {name}", "LlamaForCausalLM", "download it again")


@pytest.mark.parametrize("method", ["gptq", "fp8", "bitsandbytes", "awq"])
def test_quantised_already(folder, method):
    edit_config(folder, quantization_config={"quant_method": method})
    says(compress_refusal(folder), folder, "quantised already", method, "compress the original weights")


def test_quantised_without_saying_so(folder):
    rewrite(folder, **{MATRIX.replace(".", "__"): torch.zeros(384, 256, dtype=torch.float8_e4m3fn)})
    says(compress_refusal(folder), MATRIX, "F8_E4M3", "quantised already", "compress the original weights")


def test_compressed_again(packed):
    says(compress_refusal(packed), packed, "quantised already", "'effllm'", "compress the original weights")
    model = effllm.load(packed)
    says(refusal(effllm.compress, model, PLAN), "quantised already", "compress the original weights")


def test_compressed_again_in_memory():
    model = effllm.compress(tiny_llama(layers=1), PLAN)
    says(refusal(effllm.compress, model, PLAN), "quantised already", "compress the original weights")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [MATRIX, EMBEDDING, NORM])
def test_weight_that_is_not_finite(folder, name, value):
    tensor = read_tensors(folder)[name]
    tensor.view(-1)[-1] = value
    rewrite(folder, **{name.replace(".", "__"): tensor})
    says(compress_refusal(folder), name, "NaN or inf", "download it again")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_live_weight_that_is_not_finite(value):
    model = tiny_llama(layers=1)
    model.get_parameter("model.layers.0.mlp.down_proj.weight").data[3, 5] = value
    before = copy.deepcopy(model.state_dict())
    says(refusal(effllm.compress, model, PLAN), "model.layers.0.mlp.down_proj.weight", "NaN or inf")
    after = model.state_dict()
    assert after.keys() == before.keys(), "the model is left as it was"
    assert all(torch.equal(after[name].nan_to_num(), before[name].nan_to_num()) for name in before)


def test_dtype_too_narrow(folder):
    tensor = read_tensors(folder)[MATRIX]
    tensor[0, 0] = 1e5
    rewrite(folder, **{MATRIX.replace(".", "__"): tensor})
    says(compress_refusal(folder, dtype=torch.float16), MATRIX, "torch.float16", "too narrow", "try another dtype")


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("columns", "groups"), [(200, 4), (65, 2), (63, 1), (9, 1)])
def test_group_that_does_not_divide_the_row(columns, groups, symmetric):
    codec = from_spec({"quantize": {"bits": 4, "group_size": 64, "symmetric": symmetric, "range": "minmax"}})
    weight = torch.randn(12, columns, generator=torch.Generator().manual_seed(0))
    stored = codec.encode(weight)
    assert stored["scale"].shape == (12, groups)
    zeros = 0 if symmetric else math.ceil(groups * 4 / 8)
    counted = 12 * (math.ceil(columns * 4 / 8) + 2 * groups + zeros)
    assert codec.stored_bytes((12, columns)) == counted == sum(tensor.nbytes for tensor in stored.values())
    width = stored["scale"].float().abs().repeat_interleave(64, dim=1)[:, :columns]
    assert bool(((codec.decode(stored, (12, columns)) - weight).abs() <= 1.01 * width).all())


def test_model_whose_rows_no_group_divides(tmp_path, tokens):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=260, hidden_size=200, intermediate_size=264, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=0)  # fmt: skip
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    folder = save(model, tmp_path / "odd")
    expected = effllm.plan(folder, PLAN)
    effllm.compress_folder(folder, tmp_path / "out", PLAN)
    written = sum(tensor.nbytes for tensor in read_tensors(tmp_path / "out").values())
    assert written - 1 == expected.memory.weights, "all but the guard is counted"
    loaded = effllm.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, effllm.compress(model, PLAN)(tokens).logits)


def test_tied_in_the_config_but_not_in_the_checkpoint(folder):
    embedding = read_tensors(folder)[EMBEDDING]
    rewrite(folder, lm_head__weight=embedding.clone())
    effllm.plan(folder, PLAN)
    rewrite(folder, lm_head__weight=embedding + 1)
    says(compress_refusal(folder), folder, "lm_head.weight", EMBEDDING, "set tie_word_embeddings to false")
    edit_config(folder, tie_word_embeddings=False)
    effllm.compress_folder(folder, folder.with_name("out"), PLAN)


def test_tied_bias(tmp_path):
    config = BertConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    model = BertForMaskedLM(config).eval()
    nn.init.normal_(model.cls.predictions.bias)
    model.save_pretrained(tmp_path / "bert")
    effllm.compress_folder(tmp_path / "bert", tmp_path / "out", PLAN)
    loaded = effllm.load(tmp_path / "out")
    assert torch.equal(loaded.cls.predictions.decoder.bias, model.cls.predictions.bias)


def test_tensors_that_the_class_does_not_load(folder, tmp_path, tokens):
    extra = {
        "mtp.0.proj.weight": torch.randn(33, 7).bfloat16(),
        "mtp.0.ids": torch.arange(5),
        "mtp.0.scale": torch.randn(3).to(torch.float8_e4m3fn),
    }
    rewrite(folder, **{name.replace(".", "__"): tensor for name, tensor in extra.items()})
    plain = effllm.plan(folder, {"steps": EVERYTHING})
    assert sorted(plain.unloaded) == sorted(extra)
    out = tmp_path / "out"
    result = effllm.compress_folder(folder, out, PLAN)
    assert result.stored_bytes == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    written = read_tensors(out)
    for name, tensor in extra.items():
        assert written[name].dtype == tensor.dtype
        assert torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8))
    with torch.no_grad():
        assert torch.isfinite(effllm.load(out)(tokens).logits).all()
    assert "already done" in effllm.compress_folder(folder, out, PLAN).message


class Unknown(nn.Module):
    """No architecture that anyone knows."""

    def __init__(self):
        super().__init__()
        self.picture = nn.ConvTranspose2d(3, 16, 3)
        self.inner = nn.ModuleDict({"one": nn.Linear(16, 32), "two": nn.Linear(32, 8, bias=False)})

    def forward(self, x):
        return self.inner["two"](self.inner["one"](self.picture(x).mean((2, 3))).relu())


def test_unknown_live_architecture(caplog):
    torch.manual_seed(0)
    model, x = Unknown().eval(), torch.randn(2, 3, 8, 8)
    plain = model(x)
    with caplog.at_level(logging.WARNING, logger="effllm"):
        effllm.compress(model, "uniform-8bit")
    assert list(model.effllm_report) == ["inner.one", "inner.two"]
    assert type(model.picture) is nn.ConvTranspose2d
    assert torch.allclose(model(x), plain, atol=0.02) and not torch.equal(model(x), plain)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("effllm")]
    assert any("picture.weight" in message and "stays as it is" in message for message in told)
    assert not any("inner" in message and "weight" in message for message in told)


def test_live_model_without_a_matrix():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3))
    says(refusal(effllm.compress, model, PLAN, kind=UsageError), "matches no layer", "none")
