"""Learning blocks back: nothing changes before a step, nothing is kept that does not help, and any block can learn."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_tensors, save, tiny_llama
from families import FAMILIES, inputs_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import effllm
from effllm.layers.placing import codec_modules
from effllm.methods.quantize import Quantize
from effllm.train import learn

DATA = {"samples": 6, "sequence_length": 24}


def plan(bits: int = 2, **changes: Any) -> dict[str, Any]:
    step = {"sites": ["blocks"], "use": f"quantize:bits={bits},group_size=64"}
    return {"effort": "best", "calibration": DATA, "steps": [step], **changes}


@given(st.integers(2, 8), st.sampled_from([16, 48, "row"]), st.booleans(), st.integers(1, 5), st.integers(8, 100))
@settings(max_examples=40, deadline=None)
def test_before_a_step_it_is_what_is_stored(bits, group_size, symmetric, rows, columns):
    codec = Quantize(bits=bits, group_size=group_size, symmetric=symmetric)
    data = codec.encode(torch.randn(rows, columns))
    learnable = codec.learnable(data, (rows, columns))
    assert torch.equal(learnable(), codec.decode(data, (rows, columns)))
    again = learnable.stored()
    assert again.keys() == data.keys() and all(torch.equal(again[name], data[name]) for name in data)


@given(st.integers(2, 8), st.booleans(), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_whatever_it_has_become_what_is_stored_is_what_it_computes(bits, symmetric, seed):
    codec, generator = Quantize(bits=bits, group_size=16, symmetric=symmetric), torch.Generator().manual_seed(seed)
    learnable = codec.learnable(codec.encode(torch.randn(6, 40, generator=generator)), (6, 40))
    with torch.no_grad():
        for parameter in learnable.parameters():
            parameter.add_(0.6 * torch.randn(parameter.shape, generator=generator))
    stored = learnable.stored()
    assert {name: (tuple(t.shape), t.dtype) for name, t in stored.items()} == codec.layout((6, 40))
    assert torch.allclose(learnable(), codec.decode(stored, (6, 40)), rtol=1e-3, atol=1e-6)  # scales are fp16 there


class _Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor(1.0))


def test_what_helps_is_kept_and_what_does_not_is_undone():
    point = _Point()
    before, after = learn(point, {"place": 2.0}, lambda example: (point.place - 0.1 * example).square(), 9)
    assert after < before and abs(point.place.item() - 0.4) < 0.3
    stays = _Point()

    def opposed(example: int) -> Tensor:
        """Examples that are learnt from want the opposite of those that only measure."""
        return -stays.place if torch.is_grad_enabled() else stays.place

    before, after = learn(stays, {"place": 2.0}, opposed, 9)
    assert before == after and stays.place.item() == 1.0


def test_what_is_learnt_from_is_not_what_decides():
    point, seen, deciding = _Point(), set(), set()

    def loss(example: int) -> Tensor:
        (seen if torch.is_grad_enabled() else deciding).add(example)
        return point.place.square()

    learn(point, {"place": 1.0}, loss, 16)
    assert seen and len(deciding) == 2 and not seen & deciding


def divergence(model: nn.Module, other: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        p, q = (one(input_ids=ids).logits.float().log_softmax(-1) for one in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_learnt_blocks_lose_less_on_text_of_the_same_kind():
    model = tiny_llama(dtype=torch.float32, initializer_range=0.05, layers=2)
    generator = torch.Generator().manual_seed(0)
    ids, held = (torch.randint(1, 60, (count, 64), generator=generator) for count in (64, 16))
    losses = {}
    for effort in ("normal", "best"):
        changed = effllm.compress(copy.deepcopy(model), plan(effort=effort, inputs="compressed"), calibration=ids)
        losses[effort] = divergence(model, changed, held)
    assert losses["best"] < 0.97 * losses["normal"], losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save(tiny_llama(initializer_range=0.1, layers=2), tmp_path_factory.mktemp("train") / "llama")


@pytest.mark.parametrize("inputs", ["original", "compressed"])
def test_live_and_folder_learn_the_same(folder, tmp_path, inputs):
    effllm.compress_folder(folder, tmp_path / "out", plan(inputs=inputs), check=False)
    effllm.compress(effllm.load(folder), plan(inputs=inputs)).save_pretrained(tmp_path / "live")
    one, other = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "live")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", ["mixtral", "gpt2", "t5", "qwen2_vl", "resnet"])
def test_any_block_can_learn(name, monkeypatch):
    monkeypatch.setattr("effllm.train.STEPS", 3)
    model = FAMILIES[name]()
    batch = {key: value.float() if value.is_floating_point() else value for key, value in inputs_of(model).items()}
    effllm.compress(model, plan(bits=4), calibration=[batch, batch])
    assert codec_modules(model)
