"""Trains effllm's demo model: a small Llama on public-domain novels, shipped in `effllm/demo/`.

    python scripts/train_demo_model.py --train books-train.txt.xz --valid books-valid.txt --out effllm/demo

Writes an ordinary Hugging Face folder (bf16 safetensors, BPE tokenizer of 4096 entries, model card) and, beside it,
`calibration.txt` and `evaluation.txt`: the slices of the training and of the held-out text that the package ships.
Matrices are trained with Muon, embeddings and norms with AdamW, at one constant rate that falls linearly over the last
third of the run. Held-out loss is printed as it falls, in nats per token and in bits per byte.
"""

from __future__ import annotations

import argparse
import lzma
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEQUENCE = 512
BATCH = 16
END_OF_TEXT = "<|endoftext|>"
CALIBRATION_BOOKS = {  # a passage from the middle of each, after a heading that occurs once in the training text
    "The Count of Monte Cristo (Alexandre Dumas)": "THE COUNT OF MONTE CRISTO",
    "Don Quixote (Miguel de Cervantes, translated by John Ormsby)": "Don Quixote\n\nby Miguel de Cervantes",
    "Moby-Dick (Herman Melville)": "or, THE WHALE.\n\nBy Herman Melville",
    "Jane Eyre (Charlotte Bronte)": "JANE EYRE AN AUTOBIOGRAPHY",
    "Little Women (Louisa May Alcott)": "Little Women\n\nby Louisa May Alcott",
    "A Tale of Two Cities (Charles Dickens)": "A STORY OF THE FRENCH REVOLUTION",
    "Frankenstein (Mary Shelley)": "or, the Modern Prometheus",
    "The Prince (Niccolo Machiavelli, translated by W. K. Marriott)": "The Prince\n\nby Nicolo Machiavelli",
}
EVALUATION_BOOK = "The Adventures of Sherlock Holmes (Arthur Conan Doyle)"


def read_text(path: Path) -> str:
    raw = path.read_bytes()
    return (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode("utf-8")


def passage(text: str, start: int, characters: int) -> str:
    """Whole paragraphs of about `characters` characters that begin at or after `start`."""
    begin = text.index("\n\n", start) + 2
    return text[begin : text.index("\n\n", begin + characters)] + "\n"


def calibration_slice(train: str) -> str:
    return "\n".join(passage(train, train.index(mark) + 150_000, 24_000) for mark in CALIBRATION_BOOKS.values())


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (text[i : i + 100_000] for i in range(0, len(text), 100_000)),
        trainers.BpeTrainer(
            vocab_size=4096, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", pair=f"{END_OF_TEXT} $A $B", special_tokens=[(END_OF_TEXT, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT,
        model_max_length=SEQUENCE * 2,
    )  # fmt: skip


def build_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=384, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=SEQUENCE * 2, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    parts = [text[i : i + 500_000] for i in range(0, len(text), 500_000)]
    ids = tokenizer(parts, add_special_tokens=False)["input_ids"]
    return torch.from_numpy(np.concatenate([np.asarray(part, dtype=np.int64) for part in ids]))


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> float:
    """Mean negative log-likelihood in nats per predicted token, over windows of 512 tokens, in fp32."""
    windows = ids[: ids.numel() // SEQUENCE * SEQUENCE].view(-1, SEQUENCE)
    losses = [model(input_ids=w, labels=w).loss.double() * len(w) for w in windows.split(16)]
    return float(sum(losses) / len(windows))


def train(
    model: LlamaForCausalLM, ids: torch.Tensor, valid: torch.Tensor, epochs: float, bits: float
) -> list[tuple[int, float]]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.05, momentum=0.95, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    base_rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    steps = int(epochs * ids.numel() / (SEQUENCE * BATCH))
    compiled = torch.compile(model)
    curve: list[tuple[int, float]] = []
    generator = torch.Generator().manual_seed(0)
    starts: list[int] = []
    begin = time.monotonic()
    for step in range(steps):
        share = min(1.0, (step + 1) / 50, (steps - step) / (steps / 3))
        for group, rate in zip((g for o in optimizers for g in o.param_groups), base_rates, strict=True):
            group["lr"] = rate * share
        if len(starts) < BATCH:
            offset = int(torch.randint(SEQUENCE, (), generator=generator))
            order = torch.randperm((ids.numel() - offset) // SEQUENCE - 1, generator=generator)
            starts = (order * SEQUENCE + offset).tolist()
        batch = torch.stack([ids[s : s + SEQUENCE] for s in starts[:BATCH]])
        starts = starts[BATCH:]
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            done = time.monotonic() - begin
            print(f"step {step}/{steps} loss {loss.item():.4f} rate {share:.3f} {done:.0f} s", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            model.eval()
            nats = held_out_loss(model, valid)
            model.train()
            curve.append((step + 1, nats))
            print(f"held-out: {nats:.4f} nats/token, {nats * bits:.4f} bits/byte after step {step + 1}", flush=True)
    return curve


def model_card(parameters: int, curve: list[tuple[int, float]], bits: float, tokens: int, epochs: float) -> str:
    rows = "\n".join(f"| {step} | {nats:.4f} | {nats * bits:.4f} |" for step, nats in curve)
    books = "\n".join(f"- {name}" for name in CALIBRATION_BOOKS)
    return f"""---
license: apache-2.0
pipeline_tag: text-generation
---
# effllm demo model

A Llama-architecture language model of {parameters / 1e6:.2f} M parameters with a byte-level BPE tokenizer of 4096
entries, trained from scratch by `scripts/train_demo_model.py` on {tokens / 1e6:.1f} M tokens of public-domain novels
({epochs:g} epochs). It exists so that effllm's first command works offline; it writes prose, it knows nothing.

Held-out text: {EVALUATION_BOOK}. Final: **{curve[-1][1] * bits:.4f} bits per byte**
({curve[-1][1]:.4f} nats per token, windows of {SEQUENCE} tokens, fp32).

| step | nats per token | bits per byte |
|---|---|---|
{rows}

`calibration.txt` is cut from the training text, one passage of about 24,000 characters each from:

{books}

`evaluation.txt` is the beginning of the held-out text, {EVALUATION_BOOK}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="training text, plain or .xz")
    parser.add_argument("--valid", type=Path, required=True, help="held-out text")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--epochs", type=float, default=3.0, help="passes over the training text")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)

    text, valid_text = read_text(arguments.train), read_text(arguments.valid)
    tokenizer = train_tokenizer(text)
    ids, valid = encode(tokenizer, text), encode(tokenizer, valid_text)
    bits = valid.numel() / len(valid_text.encode()) / math.log(2)  # nats per token -> bits per byte
    model = build_model()
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {ids.numel()} training tokens, {valid.numel()} held-out tokens", flush=True)
    curve = train(model, ids, valid, arguments.epochs, bits)

    arguments.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    (arguments.out / "README.md").write_text(
        model_card(parameters, curve, bits, ids.numel(), arguments.epochs), encoding="utf-8"
    )
    (arguments.out / "calibration.txt").write_text(calibration_slice(text), encoding="utf-8")
    (arguments.out / "evaluation.txt").write_text(passage(valid_text, 500, 200_000), encoding="utf-8")


if __name__ == "__main__":
    main()
