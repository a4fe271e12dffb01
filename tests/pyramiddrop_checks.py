"""What the tests of PyramidDrop share: which models they run, and when two results are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vision_language import FAMILIES, Reference, generated

from effllm.methods.pyramiddrop import PyramidDrop, _usable_layers, apply_pyramiddrop

CORE = ("llava", "qwen3_vl", "gemma3", "paligemma")  # tried with eager attention in the default run too
every_family = pytest.mark.parametrize("name", FAMILIES)
both_attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])
every_family_and_attention = pytest.mark.parametrize(
    ("name", "attention"),
    [
        pytest.param(name, attention, marks=[pytest.mark.slow] * (attention == "eager" and name not in CORE))
        for name in FAMILIES
        for attention in ("sdpa", "eager")
    ],
)
VIDEOS = [name for name, family in FAMILIES.items() if family.video]
NEAR = {"atol": 2e-5, "rtol": 0}


def same(found: Any, expected: Any) -> None:
    """The same tokens, and logits that differ by rounding only."""
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], **NEAR)


def rows_of(results: list[Any]) -> list[Any]:
    return [torch.cat(parts) for parts in zip(*results, strict=True)]


def agrees(model: Any, inputs: Any, steps: int = 5) -> Any:
    """What generation gives while PyramidDrop is on; it must be what the reference gives."""
    with apply_pyramiddrop(model):
        found = generated(model, inputs, steps)
    same(found, Reference(model, inputs, schedule_of(model)).generated(steps))
    return found


def schedule_of(model: Any, **settings: Any) -> dict[int, float]:
    return PyramidDrop(**settings).schedule(model.config, _usable_layers(model))
