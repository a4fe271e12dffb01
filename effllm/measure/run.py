"""What a user's process needs: loads a model, generates, prints peak memory and tokens per second as JSON.

    python -m effllm.measure.run FOLDER --tokens 32

Run by `effllm eval` in a process of its own, so that nothing else counts into the peak.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens to time")
    arguments = parser.parse_args()

    from effllm.loading import load
    from effllm.measure.result import peak_memory

    model: Any = load(arguments.folder, device_map=arguments.device)
    prompt = torch.arange(16).unsqueeze(0) % model.config.get_text_config().vocab_size
    prompt = prompt.to(model.device)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(prompt, max_new_tokens=2, **settings)
    began = time.perf_counter()
    model.generate(prompt, max_new_tokens=arguments.tokens, **settings)
    seconds = time.perf_counter() - began
    on_gpu = arguments.device.startswith("cuda")
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_memory()
    figures = {"peak_memory_bytes": peak, "tokens_per_second": arguments.tokens / seconds}
    print(json.dumps(figures | {"tokens_per_second_tokens": arguments.tokens}))


if __name__ == "__main__":
    main()
