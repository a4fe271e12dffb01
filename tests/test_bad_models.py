"""Models with something odd in them: resolved, left with a reason, or refused in words."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import edit_config, tiny_llama
from families import FAMILIES, TEXT, build, inputs_of, outputs_of
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

import effllm
from effllm.errors import EffllmError, UsageError
from effllm.layers import CodecModule

EIGHT = {"steps": [{"sites": ["*"], "use": "quantize:bits=8,group_size=row"}]}


def told(caplog) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("effllm"))


def test_a_convolution_whose_groups_do_not_divide_is_named(tmp_path):
    settings = {"embedding_size": 8, "hidden_sizes": [16], "depths": [1], "groups_width": 8, "layer_type": "x"}
    build("RegNetForImageClassification", **settings).save_pretrained(tmp_path / "model")
    edit_config(tmp_path / "model", hidden_sizes=[21], groups_width=8)
    with pytest.raises(
        EffllmError, match=r"config\.json describes no RegNetForImageClassification.*divisible by groups"
    ):
        effllm.compress_folder(tmp_path / "model", tmp_path / "out", EIGHT)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_parametrised_and_weight_normed_layers_stay_and_are_named(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 48),
        parametrizations.weight_norm(nn.Linear(48, 64)),
        weight_norm(nn.Conv1d(1, 64, 64)),
        nn.Linear(1, 8),
    )
    with caplog.at_level(logging.WARNING, logger="effllm"):
        effllm.compress(model, EIGHT)
    assert [isinstance(module, CodecModule) for module in model] == [True, False, False, True]
    assert "1.parametrizations.weight.original1" in told(caplog) and "2.weight_v" in told(caplog)
    assert told(caplog).count("parametrised") == 2 and "remove_parametrizations" in told(caplog)


def test_projections_that_attention_reads_directly_stay_and_are_named(caplog):
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4), "out": nn.Linear(32, 32)})
    with caplog.at_level(logging.WARNING, logger="effllm"):
        effllm.compress(model, EIGHT)
    assert list(model.effllm_report) == ["out"]
    assert "attention.in_proj_weight" in told(caplog) and "attention.out_proj.weight" in told(caplog)
    assert "MultiheadAttention" in told(caplog)


def test_experts_that_are_multiplied_all_at_once_stay_and_are_named(caplog, tmp_path):
    model = build("Llama4ForCausalLM", "Llama4TextConfig", **{**TEXT, "intermediate_size": 256}, intermediate_size_mlp=160,
                  num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=1)  # fmt: skip
    inputs = inputs_of(model)
    with caplog.at_level(logging.WARNING, logger="effllm"):
        effllm.compress(model, EIGHT)
    assert "experts.gate_up_proj" in told(caplog) and "does not read expert by expert" in told(caplog)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(outputs_of(effllm.load(tmp_path / "out"), inputs), outputs_of(model, inputs))


def test_a_module_with_the_name_of_a_stored_tensor_is_refused():
    model = nn.Sequential(nn.Linear(32, 32))
    model[0].scale = 2.0
    with pytest.raises(EffllmError, match=r"Linear has an attribute 'scale' of its own.*--exclude"):
        effllm.compress(model, EIGHT)


def test_steps_with_nothing_to_act_on_are_said(caplog):
    plan = {
        "steps": [{"sites": ["blocks"], "use": "quantize:bits=4"}, {"sites": ["embeddings"], "use": "quantize:bits=8"}]
    }
    model = nn.Sequential(nn.ModuleList([nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(3)]))
    with caplog.at_level(logging.WARNING, logger="effllm"):
        effllm.compress(model, plan)
    assert "step 2 (embeddings) has nothing to act on" in told(caplog)
    assert (
        "step 2 (embeddings) has nothing to act on in this model"
        in effllm.plan(tiny_vit_without_patches(), plan).remarks[0]
    )


def tiny_vit_without_patches():
    model = FAMILIES["vit"]()
    model.vit.embeddings.patch_embeddings.projection = nn.Identity()
    return model


@pytest.mark.parametrize("plan", ["layerwise-4bit", "layerwise-3bit"])
def test_a_plan_that_orders_blocks_is_refused_on_a_model_without_them(plan):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    with pytest.raises(UsageError, match=r"orders repeated blocks, and the model has none"):
        effllm.compress(model, plan, calibration=torch.randn(2, 3, 8, 8))


def test_batch_norms_that_are_not_refitted_are_said(caplog):
    model = FAMILIES["resnet"]()
    with caplog.at_level(logging.WARNING, logger="effllm"):
        effllm.compress(model, "uniform-8bit")
    assert "running statistics of 10 batch norms are not refitted" in told(caplog)
    assert "batch norms are not refitted" in "\n".join(effllm.plan(FAMILIES["resnet"](), "uniform-8bit").remarks)


def test_blocks_that_the_data_never_reach_are_named():
    model = FAMILIES["llava"]()
    tokens = torch.randint(1, 257, (2, 17), generator=torch.Generator().manual_seed(0))
    message = (
        r"never reach model\.vision_tower\.encoder\.layers\.0 \(2 blocks in all\).*--exclude '.*vision_tower.*\.\*'"
    )
    with pytest.raises(UsageError, match=message):
        effllm.compress(model, "layerwise-4bit", calibration=tokens)
    effllm.compress(FAMILIES["llava"](), "layerwise-4bit", calibration=[inputs_of(model)])


def test_a_failing_forward_leaves_the_model_as_it_was(tokens):
    model = tiny_llama()
    with pytest.raises(IndexError):
        effllm.compress(model, "layerwise-4bit", calibration=tokens + 100_000)
    assert not [block for block in model.model.layers if "forward" in block.__dict__]
    effllm.compress(model, "layerwise-4bit", calibration=tokens)


def test_stacks_in_any_order_are_walked_in_call_order(tmp_path):
    from effllm.checkpoint import Checkpoint
    from effllm.source import LiveModel, StoredModel

    model = FAMILIES["whisper"]()
    inputs = inputs_of(model)
    model.save_pretrained(tmp_path / "whisper")
    walked = [block for block, _, _ in LiveModel(model).stream([inputs, inputs])]
    assert walked == [f"model.{part}.layers.{i}" for part in ("encoder", "decoder") for i in range(2) for _ in range(2)]
    stored = StoredModel(Checkpoint.open(tmp_path / "whisper"))
    reloaded = type(model).from_pretrained(tmp_path / "whisper")
    for one, other in zip(stored.stream([inputs]), LiveModel(reloaded).stream([inputs]), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])
    assert all(tensor.is_meta for tensor in stored.model.parameters()), "every block is out of memory again"
