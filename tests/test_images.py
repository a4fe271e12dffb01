"""Images as model inputs: folders, arrays and datasets, and what is wrong with some."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from media import CLASSES, IMAGES, RESNET, tiny_vit
from PIL import Image

from effllm.data.images import class_numbers, dataset_images, image_batches, labelled_batches, open_images
from effllm.errors import EffllmError, UsageError


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
