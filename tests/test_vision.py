"""Image classifiers and speech models: calibration from images and recordings, accuracy of what was compressed, errors.

The classifier is a small ResNet trained on Fashion-MNIST (`scripts/train_fashion_mnist.py`); the images are the first 1,000
of the official test set.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import read_tensors, save, tiny_tokenizer
from PIL import Image
from transformers import (
    Blip2ForConditionalGeneration,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)

import effllm
from effllm import cli
from effllm.data.images import class_numbers, dataset_images, image_batches, labelled_batches, open_images
from effllm.data.inputs import BATCH, folder_batches, modality
from effllm.data.speech import read_wave, speech_batches
from effllm.errors import EffllmError, UsageError
from effllm.measure.images import compare_images
from effllm.measure.memory import kv_cache
from effllm.measure.result import Result
from effllm.methods.quantize import Quantize
from effllm.packing import unpack
from effllm.plans import load_plan
from effllm.site import find_sites

ASSETS = Path(__file__).parent / "assets"
RESNET = ASSETS / "fashion-mnist-resnet"
IMAGES = ASSETS / "fashion-mnist-images.npz"
CLASSES = json.loads((RESNET / "config.json").read_text())["id2label"]


@pytest.fixture(scope="module")
def resnet() -> PreTrainedModel:
    """The trained classifier in fp32. Shared: tests that change it work on a copy."""
    return effllm.load(RESNET, dtype=torch.float32)


@pytest.fixture(scope="module")
def batches() -> list:
    """The 1,000 images with their labels."""
    return list(labelled_batches(RESNET, [str(IMAGES)], None, 250))


@pytest.fixture(scope="module")
def pictures() -> tuple[np.ndarray, np.ndarray]:
    with np.load(IMAGES) as file:
        return file["images"], file["labels"]


def tiny_vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, image_size=28, patch_size=7,
        num_channels=1, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def tiny_whisper() -> WhisperForConditionalGeneration:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=300, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=16, max_source_positions=50,
        max_target_positions=10, decoder_start_token_id=0, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


def tiny_wav2vec2() -> Wav2Vec2ForCTC:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=32, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128,
        conv_dim=(32, 32), conv_stride=(5, 4), conv_kernel=(10, 8), num_feat_extract_layers=2,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )  # fmt: skip
    return Wav2Vec2ForCTC(config).eval()


def write_wave(file: Path, samples: np.ndarray, rate: int = 16000, width: int = 2) -> None:
    """Writes samples `[n]` or `[n, channels]` in -1..1 as integers of `width` bytes."""
    high = np.round(samples * (2**31 - 1)).astype("<i4")
    raw = high.reshape(-1, 1).view(np.uint8)[:, 4 - width :] ^ (0x80 if width == 1 else 0)
    with wave.open(str(file), "wb") as out:
        out.setnchannels(samples.shape[1] if samples.ndim == 2 else 1)
        out.setsampwidth(width)
        out.setframerate(rate)
        out.writeframes(raw.tobytes())


def tone(pitch: float, seconds: float = 0.5) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * pitch * np.arange(int(16000 * seconds)) / 16000)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders `vit`, `whisper` and `wav2vec2`, and `recordings` with a transcript beside every second one."""
    root = tmp_path_factory.mktemp("vision")
    save(tiny_vit(), root / "vit")
    shutil.copy(RESNET / "preprocessor_config.json", root / "vit")
    save(tiny_whisper(), root / "whisper")
    WhisperFeatureExtractor(feature_size=16, chunk_length=1).save_pretrained(root / "whisper")
    tiny_wav2vec2().save_pretrained(root / "wav2vec2")
    Wav2Vec2FeatureExtractor().save_pretrained(root / "wav2vec2")
    (root / "recordings").mkdir()
    for index in range(6):
        write_wave(root / "recordings" / f"{index}.wav", tone(200 + 100 * index, 0.3 + 0.1 * index))
        if index % 2:
            (root / "recordings" / f"{index}.txt").write_text("hello")
    return root


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


def layerwise(source: Path, samples: int = 12):
    return load_plan("layerwise-4bit").override(sources=[str(source)], samples=samples)


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


# Sources of images


def write_classes(folder: Path, pictures, names: list[str], each: int = 3) -> Path:
    """A folder of one subfolder a class, `each` PNG files in it; `names` are in the order of the class numbers."""
    images, labels = pictures
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index, image in enumerate(images[labels == number][:each]):
            Image.fromarray(image).save(folder / name / f"{index}.png")
    return folder


def test_a_folder_of_classes_and_an_array_file_give_equal_batches(tmp_path, pictures):
    images, labels = pictures
    folder = write_classes(tmp_path / "named", pictures, list(CLASSES.values()))
    order = sorted(range(10), key=lambda number: CLASSES[str(number)])
    chosen = [index for number in order for index in np.flatnonzero(labels == number)[:3]]
    np.savez(tmp_path / "same.npz", images=images[chosen], labels=labels[chosen])
    one, other = (list(labelled_batches(RESNET, [str(source)], None, 8)) for source in (folder, tmp_path / "same.npz"))
    assert [len(numbers) for _, numbers in one] == [8, 8, 8, 6]
    for (pixels, numbers), (expected, expected_numbers) in zip(one, other, strict=True):
        assert torch.equal(pixels["pixel_values"], expected["pixel_values"]) and torch.equal(numbers, expected_numbers)
        assert pixels["pixel_values"].shape[1:] == (1, 28, 28) and pixels["pixel_values"].dtype == torch.float32
    normalised = (torch.from_numpy(images[chosen[:8]]).float() / 255 - 0.286) / 0.353
    torch.testing.assert_close(one[0][0]["pixel_values"][:, 0], normalised, rtol=0, atol=1e-5)


def test_classes_by_number_and_by_order(tmp_path, pictures):
    config = tiny_vit().config  # its classes are LABEL_0 to LABEL_9
    numbered = open_images(str(write_classes(tmp_path / "a", pictures, [str(n) for n in range(9, -1, -1)], 1)))
    assert class_numbers(numbered, config) == list(range(10))
    sorted_names = open_images(str(write_classes(tmp_path / "b", pictures, [f"class {c}" for c in "cbadefghij"], 1)))
    assert class_numbers(sorted_names, config) == list(range(10))
    few = open_images(str(write_classes(tmp_path / "c", pictures, ["shoe", "bag"], 1)))
    with pytest.raises(UsageError, match=r"has 2 classes and the model 10, and 'bag' is none of them.*LABEL_0"):
        class_numbers(few, config)


def test_samples_are_spread_evenly_over_each_source(tmp_path, pictures):
    images = np.arange(10, dtype=np.uint8).repeat(784).reshape(10, 28, 28)
    np.savez(tmp_path / "a.npz", images=images)
    np.savez(tmp_path / "b.npz", images=images[:, :, :, None] + 100)
    sources = [str(tmp_path / "a.npz"), str(tmp_path / "b.npz")]
    found = torch.cat([batch["pixel_values"] for batch in image_batches(RESNET, sources, 10, 8)])
    shades = (found[:, 0, 0, 0] * 0.353 + 0.286) * 255
    assert shades.round().int().tolist() == [0, 2, 4, 6, 8, 100, 102, 104, 106, 108]


def test_colour_and_grey_images_are_what_the_model_takes(tmp_path, pictures):
    (tmp_path / "flat").mkdir()
    Image.fromarray(np.stack([pictures[0][0]] * 3, -1)).save(tmp_path / "flat" / "colour.png")
    Image.fromarray(pictures[0][0]).convert("P").save(tmp_path / "flat" / "palette.gif")
    (batch,) = image_batches(RESNET, [str(tmp_path / "flat")], None, 8)
    assert torch.equal(*batch["pixel_values"])


def test_rows_of_datasets(pictures):
    datasets = pytest.importorskip("datasets")
    images, labels = pictures
    features = datasets.Features(
        {"picture": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES.values()))}
    )
    columns = {"picture": [Image.fromarray(image) for image in images[:5]], "label": labels[:5].tolist()}
    source = dataset_images(datasets.Dataset.from_dict(columns, features=features), "picture", "rows")
    assert source.count == 5 and source.labels == labels[:5].tolist() and source.classes == list(CLASSES.values())
    assert np.array_equal(np.asarray(source.picture(3)), images[3])
    with pytest.raises(EffllmError, match="the column 'image' holds no images; its columns: picture, label"):
        dataset_images(datasets.Dataset.from_dict(columns, features=features), "image", "rows")


def spoil(tmp_path: Path, pictures, how: str) -> str:
    """A bad image source: its path."""
    images, labels = pictures
    file, folder = tmp_path / "images.npz", tmp_path / "folder"
    if how == "missing":
        return str(tmp_path / "nothing")
    if how == "garbage":
        file.write_bytes(b"PK\x03\x04 no archive")
    elif how == "pickle":
        np.savez(file, images=np.array([{"a": 1}], dtype=object))
    elif how == "no images":
        np.savez(file, pixels=images)
    elif how == "floats":
        np.savez(file, images=images[:3].astype(np.float32))
    elif how == "flat pixels":
        np.savez(file, images=images[:3].reshape(3, -1))
    elif how == "wrong label count":
        np.savez(file, images=images[:3], labels=labels[:2])
    elif how == "float labels":
        np.savez(file, images=images[:3], labels=labels[:3] / 2)
    elif how == "label not in the model":
        np.savez(file, images=images[:3], labels=np.array([0, 10, 1]))
    elif how == "no labels":
        np.savez(file, images=images[:3])
    elif how == "cut off":
        np.savez(file, images=images[:3], labels=labels[:3])
        file.write_bytes(file.read_bytes()[:-500])
    else:
        write_classes(folder, pictures, list(CLASSES.values()), 1)
        if how == "no image":
            shutil.rmtree(folder)
            folder.mkdir()
            (folder / "notes.txt").write_text("none")
        elif how == "unreadable":
            (folder / "Bag" / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
        elif how == "truncated":
            data = (folder / "Bag" / "0.png").read_bytes()
            (folder / "Bag" / "0.png").write_bytes(data[: len(data) // 2])
        elif how == "mixed":
            shutil.copy(folder / "Bag" / "0.png", folder / "stray.png")
        return str(folder)
    return str(file)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("missing", UsageError, r"no image folder or \.npz file"),
        ("garbage", EffllmError, r"images\.npz cannot be read as arrays .*savez_compressed"),
        ("cut off", EffllmError, r"images\.npz cannot be read as arrays"),
        ("pickle", EffllmError, r"cannot be read as arrays .*allow_pickle"),
        ("no images", EffllmError, r"'images' must be uint8 .*there are none"),
        ("floats", EffllmError, r"they are float32 \[3, 28, 28\]"),
        ("flat pixels", EffllmError, r"they are uint8 \[3, 784\]"),
        ("wrong label count", EffllmError, r"'labels' must be 3 integers, one an image; they are uint8 \[2\]"),
        ("float labels", EffllmError, r"'labels' must be 3 integers"),
        ("label not in the model", UsageError, r"has label 10, but the classes of the model are 0 to 9"),
        ("no labels", UsageError, r"has no labels, and accuracy needs them: one subfolder a class"),
        ("no image", EffllmError, r"holds no image; give a folder of images"),
        ("mixed", EffllmError, r"holds both images and subfolders of images"),
        ("unreadable", EffllmError, r"Bag/0\.png cannot be read as an image .*remove it, or replace it"),
        ("truncated", EffllmError, r"Bag/0\.png cannot be read as an image .*remove it, or replace it"),
    ],
)
def test_bad_images_are_named_with_a_remedy(tmp_path, pictures, how, kind, message):
    with pytest.raises(kind, match=message) as failure:
        list(labelled_batches(RESNET, [spoil(tmp_path, pictures, how)], None, 8))
    assert "\n" not in str(failure.value)


def test_a_folder_without_an_image_processor(tmp_path, monkeypatch):
    shutil.copy(RESNET / "config.json", tmp_path)
    with pytest.raises(EffllmError, match=r"has no usable image processor .*preprocessor_config\.json"):
        image_batches(tmp_path, [str(IMAGES)], 1, 8)
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "Sam2ImageProcessor"}')
    if not torch_vision_installed():
        with pytest.raises(EffllmError, match="needs torchvision: pip install torchvision"):
            image_batches(tmp_path, [str(IMAGES)], 1, 8)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(UsageError, match=r"images need Pillow: pip install 'effllm\[vision\]'"):
        image_batches(RESNET, [str(IMAGES)], 1, 8)


def torch_vision_installed() -> bool:
    from importlib.util import find_spec

    return find_spec("torchvision") is not None


# Recordings


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_recordings_of_every_width(tmp_path, width):
    samples = tone(440)
    write_wave(tmp_path / "a.wav", np.stack([samples, samples], 1), width=width)
    found = read_wave(tmp_path / "a.wav", 16000)
    assert found.dtype == np.float32 and found.shape == samples.shape
    assert np.abs(found - samples).max() < 2.0 ** (2 - 8 * width) + 1e-6


def test_transcripts_are_what_the_decoder_sees(models):
    found = speech_batches(models / "whisper", [str(models / "recordings")], 4, "input_features")
    hello = tiny_tokenizer()("hello")["input_ids"]
    assert [batch["decoder_input_ids"].tolist() for batch in found] == [[[0]], [[0, *hello]], [[0, *hello]], [[0]]]
    assert all(batch["input_features"].shape == (1, 16, 100) for batch in found)


def test_bad_recordings_are_named_with_a_remedy(models, tmp_path):
    folder = tmp_path / "wavs"
    with pytest.raises(UsageError, match=r"no folder .*learn from a folder of \.wav files"):
        speech_batches(models / "whisper", [str(folder)], 4, "input_features")
    folder.mkdir()
    with pytest.raises(EffllmError, match=r"holds no \.wav file"):
        speech_batches(models / "whisper", [str(folder)], 4, "input_features")
    write_wave(folder / "slow.wav", tone(440), rate=8000)
    with pytest.raises(EffllmError, match=r"slow\.wav has 8000 samples a second, and the model takes 16000; resample"):
        speech_batches(models / "whisper", [str(folder)], 4, "input_features")
    (folder / "slow.wav").write_bytes(b"RIFF no wave")
    with pytest.raises(EffllmError, match=r"slow\.wav cannot be read as a \.wav file"):
        speech_batches(models / "whisper", [str(folder)], 4, "input_features")
    write_wave(folder / "slow.wav", np.zeros(0))
    with pytest.raises(EffllmError, match=r"slow\.wav is empty"):
        speech_batches(models / "whisper", [str(folder)], 4, "input_features")
    with pytest.raises(EffllmError, match="has no usable feature extractor"):
        speech_batches(models / "vit", [str(models / "recordings")], 4, "input_features")
    with pytest.raises(EffllmError, match="resample"):
        write_wave(folder / "slow.wav", tone(440), rate=8000)
        effllm.compress_folder(models / "whisper", tmp_path / "out", layerwise(folder))
    assert not (tmp_path / "out").exists()


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
