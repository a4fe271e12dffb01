"""Batch norms refitted after a change of the weights: accuracy comes back, and both routes agree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_tensors
from transformers import ResNetForImageClassification

import effllm
from effllm.data.images import image_batches
from effllm.site import norms_with_statistics

ASSETS = Path(__file__).parent / "assets"
RESNET = ASSETS / "fashion-mnist-resnet"
PLAN = {
    "calibration": {"samples": 256},
    "steps": [
        {"sites": ["blocks"], "order": "lim", "average_bits": 2, "high": "quantize:bits=3", "low": "quantize:bits=2"},
    ],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> tuple[Path, Path]:
    """256 images to learn from, and the others, to measure on."""
    folder = tmp_path_factory.mktemp("images")
    with np.load(ASSETS / "fashion-mnist-images.npz") as found:
        images, labels = found["images"], found["labels"]
    np.savez(folder / "learn.npz", images=images[:256], labels=labels[:256])
    np.savez(folder / "measure.npz", images=images[256:], labels=labels[256:])
    return folder / "learn.npz", folder / "measure.npz"


def plan(images, **calibration) -> dict:
    return PLAN | {"calibration": {"samples": 256, "sources": [str(images[0])]} | calibration}


def test_two_bits_lose_much_less_with_statistics_of_their_own(images, tmp_path):
    accuracy = {}
    for samples in (64, 256):
        out = tmp_path / str(samples)
        effllm.compress_folder(RESNET, out, plan(images, samples=samples), check=False)
        accuracy[samples] = effllm.evaluate(out, images=[str(images[1])], samples=None).accuracy
    assert accuracy[256] > accuracy[64] + 0.05, "64 images are too few, and leave the original's statistics"


def test_live_and_streamed_models_get_the_same_statistics(images, tmp_path):
    effllm.compress_folder(RESNET, tmp_path / "streamed", plan(images), check=False)
    model = ResNetForImageClassification.from_pretrained(RESNET)
    original = {name: norm.running_var.clone() for name, norm in norms_with_statistics(model).items()}
    batches = [
        {"pixel_values": batch["pixel_values"].to(model.dtype)}
        for batch in image_batches(RESNET, [str(images[0])], 256, 8)
    ]
    effllm.compress(model, plan(images), calibration=batches)
    model.save_pretrained(tmp_path / "live")
    live, streamed = read_tensors(tmp_path / "live"), read_tensors(tmp_path / "streamed")
    assert live.keys() == streamed.keys() and all(torch.equal(live[key], streamed[key]) for key in live)
    norms = norms_with_statistics(model)
    assert all(not norm.training and norm.momentum == 0.1 for norm in norms.values())
    assert not any(torch.equal(norm.running_var, original[name]) for name, norm in norms.items())


def test_the_dry_run_says_whether_norms_are_refitted(images):
    model = ResNetForImageClassification.from_pretrained(RESNET)
    assert "are refitted on the calibration data" in effllm.plan(model, plan(images)).remarks[-1]
    assert "not refitted: that takes 256 calibration inputs" in effllm.plan(model, plan(images, samples=64)).remarks[-1]
    assert "not refitted: that takes a plan with data" in effllm.plan(model, "uniform-4bit").remarks[-1]
