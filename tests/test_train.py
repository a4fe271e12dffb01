"""Learning blocks back: nothing changes before a step, nothing is kept that does not help, and any block can learn."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_tensors, save, tiny_llama
from families import FAMILIES, inputs_of
from torch import Tensor, nn

import effllm
from effllm.layers.placing import codec_modules
from effllm.train import learn

DATA = {"samples": 6, "sequence_length": 24}


def plan(bits: int = 2, **changes: Any) -> dict[str, Any]:
    step = {"sites": ["blocks"], "use": f"quantize:bits={bits},group_size=64"}
    return {"effort": "best", "calibration": DATA, "steps": [step], **changes}


def test_what_helps_is_kept_and_what_does_not_is_undone():
    place = nn.Parameter(torch.tensor(1.0))
    before, after = learn([place], lambda example: (place - 0.1 * example).square(), 9, rate=2.0)
    assert after < before and abs(place.item() - 0.4) < 0.3
    stays = nn.Parameter(torch.tensor(1.0))

    def opposed(example: int) -> Tensor:
        """Examples that are learnt from want the opposite of those that only measure."""
        return -stays if torch.is_grad_enabled() else stays.detach()

    before, after = learn([stays], opposed, 9)
    assert before == after and stays.item() == 1.0


def test_what_is_learnt_from_is_not_what_decides():
    place, seen, deciding = nn.Parameter(torch.tensor(1.0)), set(), set()

    def loss(example: int) -> Tensor:
        (seen if torch.is_grad_enabled() else deciding).add(example)
        return place.square()

    learn([place], loss, 16)
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
    assert losses["best"] < 0.99 * losses["normal"], losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save(tiny_llama(initializer_range=0.1, layers=2), tmp_path_factory.mktemp("train") / "llama")


@pytest.mark.parametrize("inputs", ["original", "compressed"])
def test_live_and_folder_learn_the_same(folder, tmp_path, inputs, monkeypatch):
    monkeypatch.setattr("effllm.train.STEPS", 10)
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
