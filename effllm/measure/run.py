"""What a user's process needs: loads a model, runs it, prints peak memory and speed as JSON.

    python -m effllm.measure.run FOLDER --tokens 32        # generates, greedily: tokens per second
    python -m effllm.measure.run FOLDER --image 3 224 224  # classifies random images, one at a time: images per second

Run by `effllm eval` in a process of its own, so that nothing else counts into the peak.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

IMAGES = 32  # to time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens to time")
    parser.add_argument("--image", type=int, nargs=3, metavar=("CHANNELS", "HEIGHT", "WIDTH"), help="of a classifier")
    arguments = parser.parse_args()

    from effllm.loading import load
    from effllm.measure.result import peak_memory

    model: Any = load(arguments.folder, device_map=arguments.device)
    figures = classify(model, arguments.image) if arguments.image else generate(model, arguments.tokens)
    on_gpu = arguments.device.startswith("cuda")
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
    print(json.dumps({"peak_memory_bytes": peak, **figures}))


def generate(model: Any, tokens: int) -> dict[str, Any]:
    prompt = torch.arange(16).unsqueeze(0) % model.config.get_text_config().vocab_size
    prompt = prompt.to(model.device)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(prompt, max_new_tokens=2, **settings)
    began = time.perf_counter()
    model.generate(prompt, max_new_tokens=tokens, **settings)
    return {"tokens_per_second": tokens / (time.perf_counter() - began), "tokens_per_second_tokens": tokens}


@torch.no_grad()
def classify(model: Any, shape: list[int]) -> dict[str, Any]:
    images = torch.rand(IMAGES, 1, *shape).to(model.device, model.dtype)
    for image in images[:2]:
        model(pixel_values=image).logits.cpu()
    began = time.perf_counter()
    for image in images:
        model(pixel_values=image).logits.cpu()
    return {"images_per_second": IMAGES / (time.perf_counter() - began), "images_per_second_images": IMAGES}


if __name__ == "__main__":
    main()
