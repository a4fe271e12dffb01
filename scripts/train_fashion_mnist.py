"""Trains the image classifier that the tests use: a small ResNet on Fashion-MNIST, in `tests/assets/`.

    apt-get install dataset-fashion-mnist
    python scripts/train_fashion_mnist.py --out tests/assets

Writes `fashion-mnist-resnet/`, an ordinary Hugging Face folder in float16 (about 116,000 parameters, eight residual
blocks), and `fashion-mnist-images.npz`, the first images of the official test set. The accuracy printed and written to
the model card is that of the saved float16 file on all 10,000 test images, not of the float32 training state.
"""

from __future__ import annotations

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

CLASSES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
MEAN, STD = 0.2860, 0.3530  # of the training pixels, scaled to 0..1
BATCH = 128
SHIFT = 2  # pixels by which training images are moved at most


def read_idx(folder: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Images `[n, 28, 28]` and labels `[n]` (uint8) of one half of the data set: `train` or `t10k`."""
    pixels = gzip.decompress((folder / f"{name}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{name}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(pixels, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def build_model() -> ResNetForImageClassification:
    config = ResNetConfig(
        num_channels=1, embedding_size=24, hidden_sizes=[24, 32], depths=[4, 4], layer_type="basic",
        id2label=dict(enumerate(CLASSES)), label2id={name: index for index, name in enumerate(CLASSES)},
    )  # fmt: skip
    return ResNetForImageClassification(config)


def processor() -> ViTImageProcessorPil:
    """Scales pixels to 0..1 and normalises them; images keep their 28 x 28 pixels."""
    size = {"height": 28, "width": 28}
    return ViTImageProcessorPil(do_resize=True, size=size, image_mean=[MEAN], image_std=[STD])


def normalised(images: np.ndarray) -> Tensor:
    """Pixels `[n, 1, 28, 28]` in fp32, as `processor` gives them."""
    return ((torch.from_numpy(images.copy()).float() / 255 - MEAN) / STD).unsqueeze(1)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to 2 pixels both ways, and mirrored or not."""
    count = len(images)
    padded = F.pad(images, (SHIFT,) * 4, value=-MEAN / STD)
    offset = torch.randint(0, 2 * SHIFT + 1, (2, count, 1), generator=generator)
    rows, columns = offset[0] + torch.arange(28), offset[1] + torch.arange(28)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    return padded[torch.arange(count)[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def train(model: ResNetForImageClassification, images: Tensor, labels: Tensor, epochs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    steps = epochs * (len(images) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    began = time.monotonic()
    model.train()
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(images), generator=generator)[: len(images) // BATCH * BATCH]
        for index in order.split(BATCH):
            loss = model(pixel_values=augmented(images[index], generator), labels=labels[index]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * BATCH / len(order)
        print(f"epoch {epoch + 1}/{epochs} loss {total:.4f} {time.monotonic() - began:.0f} s", flush=True)
    model.eval()


@torch.no_grad()
def accuracy(model: ResNetForImageClassification, images: Tensor, labels: Tensor) -> float:
    logits = torch.cat([model(pixel_values=part.to(model.dtype)).logits for part in images.split(500)])
    return float((logits.argmax(-1) == labels).double().mean())


def model_card(parameters: int, accuracy: float, epochs: int) -> str:
    return f"""---
license: apache-2.0
pipeline_tag: image-classification
---
# A small ResNet for Fashion-MNIST

{parameters:,} parameters in float16, trained from scratch for {epochs} epochs by `scripts/train_fashion_mnist.py` on the
60,000 training images of Fashion-MNIST (Zalando Research, MIT licence). Accuracy of this file on the 10,000 test images,
in float16: **{accuracy:.2%}**. It exists so that effllm's tests have a real image classifier.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="the idx files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write both into")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--images", type=int, default=1000, help="test images in the .npz file")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)

    images, labels = read_idx(arguments.data, "train")
    test_images, test_labels = read_idx(arguments.data, "t10k")
    model = build_model()
    train(model, normalised(images), torch.from_numpy(labels.astype(np.int64)), arguments.epochs)
    held_out = normalised(test_images), torch.from_numpy(test_labels.astype(np.int64))
    print(f"float32 in training: {accuracy(model, *held_out):.2%}", flush=True)

    folder = arguments.out / "fashion-mnist-resnet"
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    processor().save_pretrained(folder)
    saved = ResNetForImageClassification.from_pretrained(folder).eval()
    found = accuracy(saved, *held_out)
    parameters = sum(parameter.numel() for parameter in saved.parameters())
    (folder / "README.md").write_text(model_card(parameters, found, arguments.epochs), encoding="utf-8")
    print(f"{parameters} parameters, saved file in {saved.dtype}: {found:.2%}")
    count = arguments.images
    np.savez_compressed(
        arguments.out / "fashion-mnist-images.npz", images=test_images[:count], labels=test_labels[:count]
    )


if __name__ == "__main__":
    main()
