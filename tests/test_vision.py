"""Image classifiers and speech models: calibration, accuracy of what was compressed, what is refused."""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import read_tensors
from media import IMAGES, RESNET, layerwise, tiny_whisper
from transformers import (
    Blip2ForConditionalGeneration,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetModel,
    ViTForImageClassification,
    Wav2Vec2ForCTC,
    WhisperForConditionalGeneration,
)

import effllm
from effllm import cli
from effllm.data.inputs import BATCH, folder_batches, modality
from effllm.errors import EffllmError, UsageError
from effllm.measure.images import compare_images
from effllm.measure.memory import kv_cache
from effllm.measure.result import Result
from effllm.methods.quantize import Quantize
from effllm.packing import unpack
from effllm.plans import load_plan
from effllm.site import find_sites

# The codec on a whole matrix, and on narrow ones


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_one_scale_for_the_whole_matrix(bits, symmetric):
    codec = Quantize(bits=bits, group_size="tensor", symmetric=symmetric, range="minmax")
    weight = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    data = codec.encode(weight)
    shapes = {name: list(tensor.shape) for name, tensor in data.items()}
    expected = {"codes": [1, math.ceil(63 * bits / 8)], "scale": [1, 1]}
    assert shapes == (expected if symmetric else expected | {"zero": [1, 1]})
    zero = 2 ** (bits - 1) if symmetric else int(unpack(data["zero"], bits, 1))
    direct = (unpack(data["codes"], bits, 63).view(7, 9).float() - zero) * data["scale"].float()
    decoded = codec.decode(data, (7, 9))
    assert torch.equal(decoded, direct)
    assert float((decoded - weight).abs().max()) <= 1.13 * float(data["scale"].float().abs())
    assert codec.stored_bytes((7, 9)) == sum(tensor.nbytes for tensor in data.values())
    index = torch.tensor([6, 0])
    assert torch.equal(codec.decode_rows(data, index, (7, 9)), decoded[index])
    x = torch.randn(3, 9, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(codec.linear(x, data, (7, 9)), x @ decoded.t())


def test_narrow_matrices_have_options():
    with torch.device("meta"):
        model = MobileNetV2ForImageClassification(MobileNetV2Config(depth_multiplier=0.35, image_size=32))
    depthwise = [site for site in find_sites(model) if site.shape[1] == 9]
    assert len(depthwise) > 10
    for site in depthwise:
        grid = Quantize.grid(site)
        assert {option.group_size for option in grid} == {"row"} and len(grid) > 4


# Accuracy of compressed classifiers


def compared(resnet, batches, codec: str):
    model = copy.deepcopy(resnet)
    effllm.compress(model, {"steps": [{"sites": ["*"], "use": f"quantize:{codec}"}]})
    return compare_images(model, batches, resnet).figures()


def test_eight_bits_per_channel_keep_the_accuracy(resnet, batches):
    """Paired by image, since 0.3 points of 1,000 images are 3 of them and the accuracy itself is known to 0.8 points."""
    figures = compared(resnet, batches, "bits=8,group_size=row")
    assert figures["accuracy_images"] == 1000 and figures["baseline_accuracy"] > 0.9
    assert abs(figures["accuracy_change"]) <= 0.003
    assert figures["top1_agreement"] >= 0.995 and 0 < figures["kl"] < 1e-3


def test_a_scale_per_channel_beats_one_per_tensor(resnet, batches):
    for bits in (8, 3):
        channel, tensor = (
            compared(resnet, batches[:2], f"bits={bits},group_size={size}") for size in ("row", "tensor")
        )
        assert tensor["kl"] > 2 * channel["kl"], f"{bits} bits: {tensor['kl']} against {channel['kl']}"


def test_image_figures_equal_a_direct_computation(resnet, batches):
    model = copy.deepcopy(resnet)
    effllm.compress(model, "uniform-4bit")
    figures = compare_images(model, batches, resnet).figures()
    pixels = torch.cat([inputs["pixel_values"] for inputs, _ in batches])
    labels = torch.cat([numbers for _, numbers in batches])
    with torch.no_grad():
        log_q, log_p = (m(pixel_values=pixels).logits.double().log_softmax(-1) for m in (model, resnet))
    right, was_right = (log.argmax(-1) == labels for log in (log_q, log_p))
    assert figures["accuracy"] == pytest.approx(float(right.double().mean()))
    assert figures["accuracy_stderr"] == pytest.approx(float(right.double().std()) / 1000**0.5)
    assert figures["accuracy_change"] == pytest.approx(float(right.double().mean() - was_right.double().mean()))
    assert figures["kl"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-6)
    assert figures["top1_agreement"] == pytest.approx(float((log_q.argmax(-1) == log_p.argmax(-1)).double().mean()))


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["effllm", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0), *capsys.readouterr()

    return call


def test_eval_measures_a_classifier(run, tmp_path):
    assert run("compress", RESNET, "--plan", "uniform-8bit", "--out", "out")[0] == 0
    status, out, _ = run("eval", "out", "--images", IMAGES, "--baseline", RESNET, "--samples", 200, "--json")
    result = Result.model_validate_json(out)
    assert status == 0 and result.accuracy_images == 200 and result.images == [str(IMAGES)] and result.text == []
    assert result.accuracy > 0.85 and result.baseline_accuracy > 0.85 and result.top1_agreement > 0.97
    assert 0 <= result.kl < 0.01 and result.perplexity is None and result.tokens_per_second is None
    assert result.images_per_second > 0 and result.peak_memory_bytes > 50e6
    card = effllm.report.model_folder.model_card("resnet", None, result)
    assert "| accuracy |" in card and "(200 images)" in card


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([RESNET], "--images SOURCE"),
        ([RESNET, "--images", IMAGES, "--text", "default"], "no --text"),
        (["demo", "--images", IMAGES], "takes text"),
        (["whisper"], "WhisperForConditionalGeneration"),
        (["features"], "ResNetModel"),
        ([RESNET, "--images", "nowhere.npz"], "no image folder or .npz file"),
    ],
)
def test_what_cannot_be_measured_is_wrong_usage(run, models, tmp_path, arguments, message):
    shutil.copytree(models / "whisper", tmp_path / "whisper")
    ResNetModel(ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8)).save_pretrained("features")
    status, out, err = run("eval", *arguments)
    assert status == 2 and out == "" and message in err.splitlines()[-1]


def test_a_baseline_with_other_classes_is_refused(models):
    with pytest.raises(EffllmError, match="different classes"):
        effllm.evaluate(models / "vit", baseline=RESNET, images=[str(IMAGES)])


# Layer-wise plans that learn from images and recordings


@pytest.mark.parametrize("name", ["resnet", "vit", "whisper", "wav2vec2"])
def test_layerwise_folder_to_folder_equals_the_live_route(models, tmp_path, name):
    folder = RESNET if name == "resnet" else models / name
    plan = layerwise(IMAGES if name in ("resnet", "vit") else models / "recordings", samples=12)
    effllm.compress_folder(folder, tmp_path / "out", plan)
    live = effllm.load(folder)
    effllm.compress(live, plan, calibration=folder_batches(plan.calibration, live, folder))
    live.save_pretrained(tmp_path / "live")
    streamed, saved = read_tensors(tmp_path / "out"), read_tensors(tmp_path / "live")
    assert streamed.keys() == saved.keys()
    assert all(torch.equal(streamed[key], saved[key]) for key in saved)
    again = effllm.load(folder)
    effllm.compress(again, plan)
    assert again.effllm_report == live.effllm_report, "without calibration=, the model's own folder gives its processor"


def test_a_tensor_of_images_is_calibration_too(resnet, batches):
    pixels = batches[0][0]["pixel_values"][:12]
    one, other = copy.deepcopy(resnet), copy.deepcopy(resnet)
    effllm.compress(one, "layerwise-4bit", calibration=pixels)
    effllm.compress(other, "layerwise-4bit", calibration=[{"pixel_values": part} for part in pixels.split(BATCH)])
    assert one.effllm_report == other.effllm_report


def test_what_a_class_takes():
    takes = {
        LlamaForCausalLM: "text", LlavaForConditionalGeneration: "text", ViTForImageClassification: "images",
        WhisperForConditionalGeneration: "speech", Wav2Vec2ForCTC: "speech", Blip2ForConditionalGeneration: None,
    }  # fmt: skip
    assert {cls: modality(cls) for cls in takes} == takes


def test_there_is_no_default_of_images_or_speech(models, tmp_path):
    for folder, what in ((RESNET, "images"), (models / "whisper", ".wav files"), (models / "wav2vec2", ".wav files")):
        with pytest.raises(UsageError, match=rf"--calibration FOLDER of {what}, or --score zd, or --plan uniform-4bit"):
            effllm.compress_folder(folder, tmp_path / "out")
        with pytest.raises(UsageError, match="--calibration FOLDER"):
            effllm.compress(effllm.load(folder))
        assert not list(tmp_path.iterdir())
    effllm.compress_folder(RESNET, tmp_path / "out", load_plan("layerwise-4bit").override(score="zd"))


def test_texts_do_not_calibrate_a_classifier(resnet):
    with pytest.raises(UsageError, match="learns from pixel_values"):
        effllm.compress(copy.deepcopy(resnet), calibration=["a text"])


@pytest.mark.parametrize("check", [True, None])
def test_compress_does_not_measure_on_images_that_it_learned_from(models, tmp_path, caplog, check):
    result = effllm.compress_folder(models / "vit", tmp_path / "out", layerwise(IMAGES), check=check)
    assert result.accuracy is None and result.kl is None
    assert f"effllm eval {tmp_path / 'out'} --images SOURCE" in caplog.text


def test_what_the_model_needs_to_run(models):
    found = effllm.plan(models / "vit", "uniform-4bit")
    positions, width = 4 * 4, 64
    assert found.memory.kv == 0 and found.memory.scratch >= 18 * positions * width * 4
    assert effllm.plan(RESNET, "uniform-4bit").memory.kv_by_layer == []
    with torch.no_grad():
        model = tiny_whisper()
        inputs = {"input_features": torch.randn(1, 16, 100), "decoder_input_ids": torch.zeros(1, 7, dtype=torch.long)}
        cache = model(**inputs, use_cache=True).past_key_values
    parts = zip(cache.self_attention_cache.layers, cache.cross_attention_cache.layers, strict=True)
    real = [sum(tensor.nbytes for layer in pair for tensor in (layer.keys, layer.values)) for pair in parts]
    assert kv_cache(model.config, 7, torch.float32) == real


def test_the_plan_of_a_classifier_is_shown_for_one_input(run):
    status, out, _ = run("plan", RESNET, "--plan", "uniform-4bit")
    assert status == 0 and "for one input" in " ".join(out.split()) and "KV cache" not in out


# The eval


@pytest.mark.slow
def test_the_eval_measures_every_row(tmp_path):
    script = Path(__file__).parent.parent / "evals" / "vision_quantize.py"
    out = tmp_path / "rows.json"
    command = [sys.executable, script, "--images", IMAGES, "--calibration", IMAGES, "--samples", "300", "--out", out]
    subprocess.run([*map(str, command), "--threads", "1"], check=True, capture_output=True)
    rows = {row.pop("row"): Result.model_validate(row) for row in json.loads(out.read_text())}
    assert len(rows) > 20 and all(result.accuracy_images == 300 for result in rows.values())
    assert abs(rows["8 bits per channel"].accuracy_change) <= 0.01 and rows["original"].kl == 0
    sizes = [rows[f"{bits} bits per channel"].stored_bytes for bits in (8, 6, 4, 3)]
    assert sizes == sorted(sizes, reverse=True)
    assert all(name in out.with_suffix(".md").read_text() for name in rows)
