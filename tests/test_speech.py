"""Recordings as model inputs."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import tiny_tokenizer
from media import layerwise, tone, write_wave

import effllm
from effllm.data.speech import read_wave, speech_batches
from effllm.errors import EffllmError, UsageError


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
