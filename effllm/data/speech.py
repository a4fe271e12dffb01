"""Recordings as model inputs, for calibration."""

from __future__ import annotations

import inspect
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, PreTrainedConfig, PreTrainedTokenizerBase

from effllm.checkpoint import read_config
from effllm.checkpoint.skeleton import load_config
from effllm.data import spread
from effllm.data.text import load_tokenizer
from effllm.errors import EffllmError, UsageError


def speech_batches(folder: Path, sources: list[str], samples: int, name: str) -> list[dict[str, Tensor]]:
    """One recording a batch, `{name: [1, ...]}` (fp32), by the model folder's own feature extractor.

    A source is a folder of .wav files; `samples` are spread evenly over each. An encoder-decoder also gets
    `decoder_input_ids` `[1, n]`: its start token, and the tokens of NAME.txt where that lies beside NAME.wav.

    Raises:
        UsageError: a source that is no folder.
        EffllmError: no .wav file, one that cannot be read or has another sampling rate than the model, a model folder
            without a usable feature extractor, or without the tokenizer that transcripts need.
    """
    extractor = _load_extractor(folder)
    config = load_config(read_config(folder))
    keywords: dict[str, Any] = {"sampling_rate": extractor.sampling_rate, "return_tensors": "pt"}
    padding = inspect.signature(extractor.__call__).parameters.get("padding")
    if padding is not None and padding.default is False:
        keywords["padding"] = True
    tokenizer = None
    batches = []
    for file in [file for source in sources for file in _spread(source, max(1, round(samples / len(sources))))]:
        batch = {name: extractor(read_wave(file, extractor.sampling_rate), **keywords)[name]}
        if config.is_encoder_decoder:
            transcript = file.with_suffix(".txt")
            if transcript.is_file() and tokenizer is None:
                tokenizer = load_tokenizer(folder)
            batch["decoder_input_ids"] = _decoder_ids(transcript, tokenizer, config)
        batches.append(batch)
    return batches


def _spread(source: str, samples: int) -> list[Path]:
    if not Path(source).is_dir():
        raise UsageError(f"no folder {source!r}; speech models learn from a folder of .wav files")
    files = sorted(file for file in Path(source).iterdir() if file.suffix.lower() == ".wav")
    if not files:
        raise EffllmError(f"{source} holds no .wav file; speech models learn from a folder of them")
    return [files[number] for number in spread(len(files), samples)]


def _load_extractor(folder: Path) -> Any:
    try:
        return AutoFeatureExtractor.from_pretrained(folder)
    except Exception as error:  # what a missing or damaged file makes of transformers has no common class
        reason = " ".join(str(error).split())[:200]
        raise EffllmError(
            f"{folder} has no usable feature extractor ({reason}); speech needs its preprocessor_config.json: download it "
            "again"
        ) from error


def read_wave(file: Path, rate: int) -> np.ndarray:
    """The samples of a .wav file of integers, channels averaged: float32 `[n]` in -1..1."""
    try:
        with wave.open(str(file)) as recording:
            channels, width, found, count = recording.getparams()[:4]
            raw = np.frombuffer(recording.readframes(count), np.uint8)
    except (wave.Error, EOFError, OSError) as error:
        raise EffllmError(
            f"{file} cannot be read as a .wav file of integers ({error}); convert it to 16-bit PCM"
        ) from None
    if found != rate:
        raise EffllmError(
            f"{file} has {found} samples a second, and the model takes {rate}; resample it: ffmpeg -i IN.wav -ar {rate} "
            "OUT.wav"
        )
    if not len(raw) or len(raw) % (width * channels):
        raise EffllmError(f"{file} is empty or cut off; remove it, or replace it")
    high = np.zeros((len(raw) // width, 4), np.uint8)  # 8, 16, 24 or 32 bits as the upper bytes of 32
    high[:, 4 - width :] = raw.reshape(-1, width) ^ (0x80 if width == 1 else 0)
    samples = high.view("<i4").reshape(-1, channels).astype(np.float32) / 2**31
    return samples.mean(1)  # type: ignore[no-any-return]


def _decoder_ids(transcript: Path, tokenizer: PreTrainedTokenizerBase | None, config: PreTrainedConfig) -> Tensor:
    """What the decoder sees: the start token, then the transcript without its end, up to the decoder's positions."""
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise EffllmError("config.json names no decoder_start_token_id, which the decoder begins with; add it")
    ids: list[int] = []
    if transcript.is_file() and tokenizer is not None:
        ids = tokenizer(transcript.read_text(encoding="utf-8").strip())["input_ids"]
        ids = ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids
    ids = ids if ids[:1] == [start] else [start, *ids]
    return torch.tensor([ids[: getattr(config, "max_target_positions", len(ids))]])
