"""Images as batches of model inputs, for calibration and for measuring."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from effllm.checkpoint import read_config
from effllm.checkpoint.skeleton import load_config
from effllm.data import spread
from effllm.data.text import load_dataset
from effllm.errors import EffllmError, UsageError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
CHANNELS = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class ImageSource:
    """Pictures by number."""

    name: str
    count: int
    picture: Callable[[int], Any]
    """Number -> Pillow image."""
    labels: list[int] | None = None
    """Class number of each picture, where known."""
    classes: list[str] | None = None
    """Names of the class numbers, where known."""


def image_batches(
    folder: Path, sources: list[str], samples: int | None, batch_size: int
) -> Iterator[dict[str, Tensor]]:
    """Batches `{"pixel_values": [up to batch_size, channels, height, width]}` (fp32), by the model folder's own processor.

    A source is a folder of images or of one subfolder of images a class, a `.npz` file with `images` (uint8
    `[n, height, width]` or `[n, height, width, channels]`) and perhaps `labels` (integers `[n]`), or a `datasets` id as
    `id:config:split:column`. `samples` are spread evenly over each source; None takes all.

    Raises:
        UsageError: a source that is no folder, .npz file or dataset id, or Pillow is missing.
        EffllmError: no image, an image that cannot be read, or a model folder without a usable image processor.
    """
    prepare = _preprocessor(folder)
    opened = [open_images(source) for source in sources]
    return (prepare(source, part) for source, part in _parts(opened, samples, batch_size))


def labelled_batches(
    folder: Path, sources: list[str], samples: int | None, batch_size: int
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """`image_batches`, each with the model's class numbers `[n]` (int64).

    Raises:
        UsageError: a source without labels, or with labels that are not the model's; see `image_batches`.
    """
    prepare = _preprocessor(folder)
    config = load_config(read_config(folder))
    opened = [open_images(source) for source in sources]
    numbers = {source.name: torch.tensor(class_numbers(source, config)) for source in opened}
    return ((prepare(source, part), numbers[source.name][part]) for source, part in _parts(opened, samples, batch_size))


def _parts(opened: list[ImageSource], samples: int | None, batch_size: int) -> Iterator[tuple[ImageSource, list[int]]]:
    """Source and picture numbers of each batch."""
    for source in opened:
        chosen = spread(source.count, source.count if samples is None else max(1, round(samples / len(opened))))
        for start in range(0, len(chosen), batch_size):
            yield source, chosen[start : start + batch_size]


def _preprocessor(folder: Path) -> Callable[[ImageSource, list[int]], dict[str, Tensor]]:
    processor = load_image_processor(folder)
    config = load_config(read_config(folder))
    mode = CHANNELS.get(getattr(getattr(config, "vision_config", config), "num_channels", 3), "RGB")

    def prepare(source: ImageSource, numbers: list[int]) -> dict[str, Tensor]:
        pictures = [source.picture(number).convert(mode) for number in numbers]
        try:
            return {"pixel_values": processor(pictures, return_tensors="pt")["pixel_values"]}
        except ValueError as error:  # what transformers makes of images of different sizes
            reason = " ".join(str(error).split())[:200]
            raise EffllmError(
                f"{source.name}: the image processor of {folder} makes no batch of its images ({reason}); bring them to "
                "one size first"
            ) from error

    return prepare


def require_pillow() -> None:
    """Raises UsageError where Pillow is missing."""
    if find_spec("PIL") is None:
        raise UsageError("images need Pillow: pip install 'effllm[vision]'")


def load_image_processor(folder: Path) -> Any:
    """The image processor of a model folder."""
    require_pillow()
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder)
    except Exception as error:  # what a missing or damaged file makes of transformers has no common class
        reason = " ".join(str(error).split())
        if "torchvision" in reason and find_spec("torchvision") is None:
            raise EffllmError(f"the image processor of {folder} needs torchvision: pip install torchvision") from error
        raise EffllmError(
            f"{folder} has no usable image processor ({reason[:200]}); images need its preprocessor_config.json: download "
            "it again"
        ) from error


def class_numbers(source: ImageSource, config: PreTrainedConfig) -> list[int]:
    """The model's class number of every picture: by class name where all names are the model's, else as they stand.

    Raises:
        UsageError: no labels, other classes than the model's, or a number that it does not have.
    """
    if source.labels is None:
        raise UsageError(
            f"{source.name} has no labels, and accuracy needs them: one subfolder a class, or 'labels' in the .npz file"
        )
    known: dict[str, int] = {name: int(number) for name, number in (config.label2id or {}).items()}
    names, labels, count = source.classes, source.labels, int(config.num_labels or 0)
    if names is not None and set(names) <= known.keys():
        labels = [known[names[label]] for label in labels]
    elif names is not None and len(names) != count:
        unknown = next(name for name in names if name not in known)
        raise UsageError(
            f"{source.name} has {len(names)} classes and the model {count}, and {unknown!r} is none of them; name the "
            f"classes as in id2label of config.json: {', '.join(list(known)[:3])}, ..."
        )
    wrong = next((label for label in labels if not 0 <= label < count), None)
    if wrong is not None:
        raise UsageError(f"{source.name} has label {wrong}, but the classes of the model are 0 to {count - 1}")
    return labels


def open_images(source: str) -> ImageSource:
    """The pictures of one source; see `image_batches`."""
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if path.is_file() and path.suffix == ".npz":
        return _arrays(path)
    if path.exists() or source.startswith((".", "/")) or path.suffix:
        raise UsageError(f"no image folder or .npz file {source!r}")
    return _dataset(source)


def _folder(path: Path) -> ImageSource:
    def images(folder: Path) -> list[Path]:
        return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())

    flat = images(path)
    members = {folder.name: images(folder) for folder in sorted(path.iterdir()) if folder.is_dir()}
    classes = [name for name, files in members.items() if files]
    if bool(flat) == bool(classes):
        found = "both images and subfolders of images" if flat else "no image"
        raise EffllmError(f"{path} holds {found}; give a folder of images, or of one subfolder of images a class")
    if flat:
        return ImageSource(str(path), len(flat), lambda number: read_image(flat[number]))
    files = [file for name in classes for file in members[name]]
    numbered = all(name.isdecimal() for name in classes)
    labels = [int(name) if numbered else index for index, name in enumerate(classes) for _ in members[name]]
    return ImageSource(
        str(path), len(files), lambda number: read_image(files[number]), labels, None if numbered else classes
    )


def read_image(file: Path) -> Any:
    """The picture in a file, as a Pillow image."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.copy()
    except Exception as error:  # what a damaged file makes of Pillow's decoders has no common class
        raise EffllmError(f"{file} cannot be read as an image ({error}); remove it, or replace it") from error


def _arrays(path: Path) -> ImageSource:
    from PIL import Image

    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("no zip archive")
        with np.load(path, allow_pickle=False) as file:
            images, labels = (file[name] if name in file.files else None for name in ("images", "labels"))
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise EffllmError(
            f"{path} cannot be read as arrays ({error}); write it with numpy.savez_compressed(FILE, images=..., labels=...)"
        ) from None
    if images is None or images.dtype != np.uint8 or not _is_pictures(images.shape):
        found = "there are none" if images is None else f"they are {images.dtype} {list(images.shape)}"
        raise EffllmError(
            f"{path}: 'images' must be uint8 [n, height, width] or [n, height, width, 1, 3 or 4]; {found}"
        )
    if labels is not None and (labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]):
        raise EffllmError(
            f"{path}: 'labels' must be {len(images)} integers, one an image; they are {labels.dtype} {list(labels.shape)}"
        )
    pixels = images[..., 0] if images.shape[3:] == (1,) else images
    numbers = None if labels is None else [int(label) for label in labels]
    return ImageSource(str(path), len(pixels), lambda number: Image.fromarray(pixels[number]), numbers)


def _is_pictures(shape: tuple[int, ...]) -> bool:
    return len(shape) in (3, 4) and 0 not in shape and shape[3:] in ((), (1,), (3,), (4,))


def _dataset(source: str) -> ImageSource:
    rows, column = load_dataset(source, streaming=False)
    return dataset_images(rows, column or "image", source)


def dataset_images(rows: Any, column: str, name: str) -> ImageSource:
    """The pictures of a `datasets` table; its labels are the column `label`, if it has one."""
    if column not in rows.column_names or not len(rows) or not hasattr(rows[0][column], "convert"):
        raise EffllmError(f"{name}: the column {column!r} holds no images; its columns: {', '.join(rows.column_names)}")
    labels = [int(label) for label in rows["label"]] if "label" in rows.column_names else None
    classes = getattr(rows.features["label"], "names", None) if labels is not None else None
    return ImageSource(name, len(rows), lambda number: rows[number][column], labels, classes)
