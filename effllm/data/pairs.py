"""Images with text as inputs of a vision-language model, by its own processor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoProcessor

from effllm.data import spread
from effllm.data.images import read_image, require_pillow
from effllm.errors import EffllmError
from effllm.source import Batch

ROWS = "metadata.jsonl"


def holds_pairs(source: str) -> bool:
    """Whether a calibration source is a folder of images with texts: one with a `metadata.jsonl`, as `datasets` has it."""
    return (Path(source) / ROWS).is_file()


def pair_batches(folder: Path, source: str, samples: int) -> list[Batch]:
    """One batch an image, of what the processor in the model's `folder` makes of it and its text.

    `source` is a folder of images with a `metadata.jsonl`, of whose rows `{"file_name": ..., "text": ...}` as many as
    `samples` are taken, spread evenly. With a chat template the user shows the image and the model says the text;
    otherwise the text follows the image's token.

    Raises:
        UsageError: Pillow is missing.
        EffllmError: a row or an image that cannot be read, or a model folder without a usable processor.
    """
    require_pillow()
    rows, processor = _rows(Path(source)), _processor(folder)
    chosen = [rows[number] for number in spread(len(rows), samples)]
    return [_batch(processor, read_image(file).convert("RGB"), text, folder) for file, text in chosen]


def _processor(folder: Path) -> Any:
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except Exception as error:  # what a missing or damaged file makes of transformers has no common class
        reason = " ".join(str(error).split())[:200]
        raise EffllmError(f"{folder} has no usable processor ({reason}); images with text need one") from error
    if not hasattr(processor, "image_processor"):
        raise EffllmError(f"{folder} has no processor for images: calibrate it on text")
    return processor


def _rows(source: Path) -> list[tuple[Path, str]]:
    """Image file and text of every row."""
    found = []
    try:
        lines = (source / ROWS).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise EffllmError(f"{source / ROWS} cannot be read: {error}") from None
    for number, row in enumerate(rows, start=1):
        name, text = (row.get(key) for key in ("file_name", "text")) if isinstance(row, dict) else (None, None)
        if (
            not isinstance(name, str)
            or not isinstance(text, str)
            or ".." in Path(name).parts
            or Path(name).is_absolute()
        ):
            raise EffllmError(f"{source / ROWS}, row {number}: it needs 'file_name', inside the folder, and 'text'")
        found.append((source / name, text))
    if not found:
        raise EffllmError(f"{source / ROWS} has no row")
    return found


def _batch(processor: Any, image: Any, text: str, folder: Path) -> Batch:
    if processor.chat_template is not None:
        said = [{"role": "user", "content": [{"type": "image"}]}]
        said.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
        text = processor.apply_chat_template(said, tokenize=False)
    else:
        text = f"{processor.tokenizer.bos_token or ''}{processor.image_token}{text}"
    try:
        return dict(processor(images=[image], text=[text], return_tensors="pt", add_special_tokens=False))
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise EffllmError(f"the processor of {folder} makes no input of an image with text: {reason}") from error
