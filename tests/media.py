"""Small models of images and speech, and data for them.

The classifier is a small ResNet trained on Fashion-MNIST (`scripts/train_fashion_mnist.py`); the images are the first 1,000
of the official test set.
"""

from __future__ import annotations

import json
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import save
from transformers import (
    PreTrainedModel,
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
from effllm.data.images import labelled_batches
from effllm.plans import load_plan

ASSETS = Path(__file__).parent / "assets"
RESNET = ASSETS / "fashion-mnist-resnet"
IMAGES = ASSETS / "fashion-mnist-images.npz"
CLASSES = json.loads((RESNET / "config.json").read_text())["id2label"]


@pytest.fixture(scope="session")
def resnet() -> PreTrainedModel:
    """The trained classifier in fp32. Shared: tests that change it work on a copy."""
    return effllm.load(RESNET, dtype=torch.float32)


@pytest.fixture(scope="session")
def batches() -> list:
    """The 1,000 images with their labels."""
    return list(labelled_batches(RESNET, [str(IMAGES)], None, 250))


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
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


def layerwise(source: Path, samples: int = 12):
    return load_plan("layerwise-4bit").override(sources=[str(source)], samples=samples)
