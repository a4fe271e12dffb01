"""Calibration text that the model writes itself, in the form in which it is going to be used."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from effllm.checkpoint import Checkpoint
from effllm.checkpoint.tensors import read_tensors, write_tensors
from effllm.data.caching import cache_folder
from effllm.errors import EffllmError
from effllm.resume import run_key

AT_ONCE = 16  # texts written together
PLACE = "the place of a message"
logger = logging.getLogger(__name__)


def own_windows(folder: Path, tokenizer: PreTrainedTokenizerBase, samples: int, length: int, seed: int = 0) -> Tensor:
    """Token ids `[samples, length]` (int64) of texts sampled from the model in `folder` at temperature 1.

    A text begins with the begin-of-text token; where the tokenizer has a chat template, with what the template puts before
    a user's message, so that the model writes the question and the answer. Texts that end are joined. They are kept in the
    cache. (After LLM-QAT, arXiv 2305.17888, section 2.1, which lets the model write its own data.)

    Raises:
        EffllmError: the model writes nothing, or is no language model.
    """
    key = run_key(source=Checkpoint.open(folder).identity(), samples=samples, length=length, seed=seed)
    file = cache_folder("texts") / f"{key[:16]}.safetensors"
    if not file.exists():
        logger.info("calibration: the model writes %d x %d tokens", samples, length)
        ids = _written(folder, tokenizer, samples * length, length, seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, {"tokens": ids.view(samples, length)})
    return read_tensors(file)["tokens"]


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens before a text of the model's own."""
    begin = [] if tokenizer.bos_token_id is None else [cast(int, tokenizer.bos_token_id)]
    if tokenizer.chat_template is None:
        return begin or [cast(int, tokenizer.eos_token_id)]
    text = str(tokenizer.apply_chat_template([{"role": "user", "content": PLACE}], tokenize=False))
    return cast(list[int], tokenizer(text.partition(PLACE)[0], add_special_tokens=False)["input_ids"])


@torch.no_grad()
def _written(folder: Path, tokenizer: PreTrainedTokenizerBase, wanted: int, length: int, seed: int) -> Tensor:
    from effllm.loading import load

    model: Any = load(folder, dtype=torch.float32)
    if not model.can_generate():
        raise EffllmError(f"{folder} holds no model that writes text; give --calibration a text")
    start = opening(tokenizer)
    prompt = torch.tensor([start] * AT_ONCE)
    ends = {tokenizer.eos_token_id, *torch.tensor(model.generation_config.eos_token_id or []).flatten().tolist()}
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    found: list[int] = []
    try:
        while len(found) < wanted:
            before = len(found)
            texts = model.generate(
                prompt, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=length - len(start),
                attention_mask=torch.ones_like(prompt), pad_token_id=tokenizer.pad_token_id or 0,
            )  # fmt: skip
            for text in texts.tolist():
                body = text[len(start) :]
                stop = next((place for place, token in enumerate(body) if token in ends), len(body))
                found += start + body[:stop] if stop else []
            if len(found) == before:
                raise EffllmError(f"{folder} ends every text at once; give --calibration a text")
    finally:
        torch.set_rng_state(generator_state)
    return torch.tensor(found[:wanted])
