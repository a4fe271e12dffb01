"""Talking to a model on a terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from effllm.checkpoint import resolve
from effllm.data.text import load_tokenizer
from effllm.loading import load
from effllm.measure.result import peak_memory


def talk(
    model: str,
    prompt: str | None,
    tokens: int,
    temperature: float,
    device: str,
    dtype: torch.dtype | None,
    seed: int,
    revision: str | None,
) -> None:
    """Answers `prompt`, or every line from standard input until it ends; figures go to stderr."""
    torch.manual_seed(seed)
    folder = resolve(model, revision)
    tokenizer = load_tokenizer(folder)
    settings: dict[str, Any] = {"device_map": device} | ({} if dtype is None else {"dtype": dtype})
    loaded: Any = load(folder, **settings)
    sampling: dict[str, Any] = {"do_sample": temperature > 0} | ({"temperature": temperature} if temperature else {})
    messages: list[dict[str, Any]] = []
    while True:
        line = prompt if prompt is not None else _ask()
        if line is None:
            return
        messages.append({"role": "user", "content": line})
        inputs = _encode(tokenizer, messages, line).to(loaded.device)
        began = time.perf_counter()
        out = loaded.generate(
            **inputs, max_new_tokens=tokens, streamer=TextStreamer(tokenizer, skip_prompt=True), **sampling
        )
        seconds = time.perf_counter() - began
        answer = out[0, inputs["input_ids"].shape[1] :]
        messages.append({"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)})
        sys.stderr.write(f"[{len(answer) / seconds:.1f} tokens/s, peak memory {peak_memory() / 1e6:.0f} MB]\n")
        if prompt is not None:
            return


def _ask() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _encode(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], line: str) -> Any:
    """The conversation through the model's own template; a model without one just continues the text."""
    if tokenizer.chat_template is None:
        return tokenizer(line, return_tensors="pt", return_token_type_ids=False)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
