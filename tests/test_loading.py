"""A compressed model behaves as a plain one, by every door."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import read_tensors, save, tiny_gpt2, tiny_llama
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

import effllm
from effllm.errors import EffllmError
from effllm.layers import CodecEmbedding, CodecLinear
from effllm.layers.placing import codec_modules

PLAN = "uniform-4bit"
WIDTHS = {"vocab_size": 512, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "llama": lambda: tiny_llama(),
    "llama-untied": lambda: tiny_llama(tied=False),
    "gpt2": tiny_gpt2,
    "qwen2": lambda: build(Qwen2ForCausalLM, Qwen2Config(**WIDTHS, intermediate_size=384, num_key_value_heads=2)),
    "gemma3": lambda: build(
        Gemma3ForCausalLM,
        Gemma3TextConfig(
            **WIDTHS, intermediate_size=384, num_key_value_heads=1, head_dim=64, sliding_window=8, pad_token_id=0,
            layer_types=["sliding_attention", "full_attention"],
        ),
    ),
    "gpt_neox": lambda: build(GPTNeoXForCausalLM, GPTNeoXConfig(**WIDTHS, intermediate_size=384)),
    "falcon": lambda: build(FalconForCausalLM, FalconConfig(**WIDTHS, ffn_hidden_size=384)),
    "opt": lambda: build(OPTForCausalLM, OPTConfig(**WIDTHS, ffn_dim=384, word_embed_proj_dim=128, pad_token_id=1)),
}  # fmt: skip


def build(cls: type[PreTrainedModel], config) -> PreTrainedModel:
    torch.manual_seed(0)
    config.bos_token_id = config.eos_token_id = 0
    return cls._from_config(config, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def packed(llama_folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    effllm.compress_folder(llama_folder, out, PLAN)
    return out


@pytest.fixture
def model(packed):
    return effllm.load(packed)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_families_reload_bit_equal(family, tmp_path, tokens):
    """Folder route, reloaded, equals the live route in memory: tied, fused and renamed keys included."""
    source = save(FAMILIES[family](), tmp_path / "source")
    effllm.compress_folder(source, tmp_path / "out", PLAN)
    live = effllm.compress(AutoModelForCausalLM.from_pretrained(source), PLAN)
    expected = live(tokens).logits
    assert torch.isfinite(expected).all()
    assert len(codec_modules(live)) > 6
    assert torch.equal(effllm.load(tmp_path / "out")(tokens).logits, expected)
    live.save_pretrained(tmp_path / "saved")
    one, other = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "saved")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(tokens).logits, expected)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox", "opt", "falcon"])
def test_layerwise_folder_and_live_choose_alike(family, tmp_path, tokens):
    source = save(FAMILIES[family](), tmp_path / "source")
    text = tmp_path / "text.txt"
    text.write_text("It is a truth universally acknowledged. " * 40)
    step = {"order": "lim", "high": "quantize:bits=8", "low": "quantize:bits=2", "average_bits": 5}
    plan = effllm.Plan.model_validate({"steps": [{"sites": ["blocks"], **step}]}).override(
        sources=[str(text)], samples=4, sequence_length=32
    )
    effllm.compress_folder(source, tmp_path / "out", plan, check=False)
    live = effllm.compress(AutoModelForCausalLM.from_pretrained(source), plan)
    assert len(set(live.effllm_report.values())) == 2
    assert torch.equal(effllm.load(tmp_path / "out")(tokens).logits, live(tokens).logits)


def test_fresh_process_by_both_doors(packed, model, tokens, tmp_path):
    torch.save(tokens, tmp_path / "tokens.pt")
    code = (
        "import sys, torch, effllm; from transformers import AutoModelForCausalLM\n"
        "tokens = torch.load(sys.argv[2])\n"
        "one = AutoModelForCausalLM.from_pretrained(sys.argv[1])(tokens).logits\n"
        "assert torch.equal(one, effllm.load(sys.argv[1])(tokens).logits)\n"
        "torch.save(one, sys.argv[3])\n"
    )
    arguments = [str(packed), str(tmp_path / "tokens.pt"), str(tmp_path / "logits.pt"), str(torch.get_num_threads())]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(tokens).logits)


def test_forgetting_the_import_is_an_error(packed):
    code = (
        "import sys; from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(packed)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "mismatch" in done.stderr.lower()


def test_import_order_does_not_matter(packed):
    code = (
        "import sys, transformers; transformers.LlamaForCausalLM; import effllm; "
        "m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]); print(type(m.lm_head).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(packed)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "CodecLinear"


def test_save_pretrained_round_trips(packed, model, tokens, tmp_path):
    model.save_pretrained(tmp_path / "again")
    one, other = read_tensors(packed), read_tensors(tmp_path / "again")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(effllm.load(tmp_path / "again")(tokens).logits, model(tokens).logits)


def test_tied_weights_are_stored_once_and_stay_tied(packed, model):
    assert not [key for key in read_tensors(packed) if key.startswith("lm_head")]
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert each.lm_head.codes is each.model.embed_tokens.codes
        assert each.lm_head.scale is each.model.embed_tokens.scale


def test_layers_inherit_and_show_metadata(model):
    assert isinstance(model.lm_head, nn.Linear) and isinstance(model.lm_head, CodecLinear)
    assert isinstance(model.model.embed_tokens, nn.Embedding) and isinstance(model.model.embed_tokens, CodecEmbedding)
    weight = model.lm_head.weight
    assert weight.shape == (512, 256) and weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    assert torch.equal(weight + 0, model.lm_head.decoded()) and torch.equal(weight[3], model.lm_head.decoded()[3])
    for change in (lambda: weight.add_(1), lambda: weight.data.__iadd__(1), lambda: torch.add(weight, 1, out=weight)):
        with pytest.raises(EffllmError, match="cannot be changed in place"):
            change()
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_compute_alike(copied, model, tokens):
    assert torch.equal(copied(model)(tokens).logits, model(tokens).logits)


def test_generate_with_every_cache(model, tokens):
    settings = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(tokens), "pad_token_id": 0}
    plain = model.generate(tokens, **settings)
    assert plain.shape == (2, 22)
    assert torch.equal(model.generate(tokens, cache_implementation="static", **settings), plain)
    assert torch.equal(model.generate(tokens, use_cache=False, **settings), plain)


def test_compile_traces_one_graph(model, tokens):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_compile_with_inductor(model, tokens):
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model)(tokens).logits, model(tokens).logits, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map(device_map, packed, model, tokens):
    placed = AutoModelForCausalLM.from_pretrained(packed, device_map=device_map)
    assert torch.equal(placed(tokens).logits, model(tokens).logits)


def test_disk_offload(packed, model, tokens, tmp_path):
    offloaded = AutoModelForCausalLM.from_pretrained(
        packed, device_map="auto", max_memory={"cpu": "600KB"}, offload_folder=tmp_path / "offload"
    )
    assert set(offloaded.hf_device_map.values()) == {"cpu", "disk"}
    assert torch.equal(offloaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtype_changes_arithmetic_and_no_stored_tensor(dtype, packed, model, tokens):
    loaded, moved = effllm.load(packed, dtype=dtype), copy.deepcopy(model).to(dtype)
    assert loaded.dtype == moved.dtype == dtype
    for name, layer in codec_modules(loaded).items():
        for key, tensor in layer.stored().items():
            assert torch.equal(tensor, codec_modules(model)[name].stored()[key])
            assert torch.equal(tensor, codec_modules(moved)[name].stored()[key])
    assert loaded(tokens).logits.dtype == dtype
    torch.testing.assert_close(loaded(tokens).logits.float(), model(tokens).logits.float(), rtol=0.1, atol=0.1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_moves_to_a_gpu(model, tokens):
    expected = model(tokens).logits
    moved = copy.deepcopy(model).to("cuda")
    torch.testing.assert_close(moved(tokens.to("cuda")).logits.cpu(), expected, rtol=5e-2, atol=5e-2)


def test_gradients_reach_the_inputs(model, tokens):
    dense = copy.deepcopy(model).dequantize()
    gradients = []
    for each in (model, dense):
        inputs = each.get_input_embeddings()(tokens).detach().requires_grad_()
        each(inputs_embeds=inputs).logits.float().square().mean().backward()
        gradients.append(inputs.grad)
    torch.testing.assert_close(*gradients, rtol=5e-2, atol=1e-4)


def test_gradient_checkpointing_changes_nothing(model, tokens):
    gradients = []
    model.train()
    for enable in (model.gradient_checkpointing_disable, model.gradient_checkpointing_enable):
        enable()
        inputs = model.get_input_embeddings()(tokens).detach().requires_grad_()
        model(inputs_embeds=inputs, use_cache=False).logits.float().square().mean().backward()
        gradients.append(inputs.grad)
    assert torch.equal(*gradients)


def test_peft_adapters_train_on_the_packed_base(model, tokens):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=4))
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_B" in n)


def test_dequantize_gives_a_plain_model(model, tokens, tmp_path):
    expected = model(tokens).logits
    dense = model.dequantize()
    assert not codec_modules(dense) and type(dense.lm_head) is nn.Linear
    assert dense.lm_head.weight is dense.model.embed_tokens.weight
    torch.testing.assert_close(dense(tokens).logits, expected, rtol=2e-2, atol=2e-2)
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")(tokens).logits, dense(tokens).logits)


def test_other_heads_of_the_same_folder(packed, model, tokens):
    base = AutoModel.from_pretrained(packed)
    assert torch.equal(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state)


def test_no_dense_copy_is_made(packed, model):
    dense = {(512, 256), (256, 256), (384, 256), (256, 384), (128, 256)}
    held = [tensor for tensor in (*model.parameters(), *model.buffers()) if tuple(tensor.shape) in dense]
    assert all(tensor.dtype == torch.uint8 for tensor in held)


def test_load_names_a_missing_tensor(packed, tmp_path):
    import json
    import shutil

    broken = shutil.copytree(packed, tmp_path / "broken")
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    name = "model.layers.1.mlp.up_proj.scale"
    del index["weight_map"][name]
    from safetensors.torch import load_file, save_file

    for file in broken.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            del tensors[name]
            save_file(tensors, file, metadata={"format": "pt"})
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(EffllmError, match=r"model\.layers\.1\.mlp\.up_proj\.scale"):
        effllm.load(broken)


def test_load_names_the_first_layer_that_is_not_finite(packed, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(packed, tmp_path / "broken")
    for file in broken.glob("*.safetensors"):
        tensors = load_file(file)
        if "model.layers.1.mlp.up_proj.scale" in tensors:
            tensors["model.layers.1.mlp.up_proj.scale"].fill_(float("inf"))
            save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(EffllmError, match=r"model\.layers\.1\.mlp\.up_proj gives values"):
        effllm.load(broken, verify=False)
