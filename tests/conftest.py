"""Tiny real models: random weights, made once a session."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

pytest_plugins = ["damage", "media"]
torch.set_num_threads(1)  # tiny tensors: a second thread only waits


def tiny_llama(tied: bool = True, layers: int = 3, dtype: torch.dtype = torch.bfloat16, **changes) -> LlamaForCausalLM:
    """A Llama of widths 256 and 384, so that groups of 128 occur."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=384, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0, max_position_embeddings=256,
        **changes,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def tiny_gpt2() -> GPT2LMHeadModel:
    """A GPT-2: its matrices are Conv1D, laid out [in, out]."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=512, n_embd=256, n_inner=384, n_layer=2, n_head=4, n_positions=128,
                        bos_token_id=0, eos_token_id=0)  # fmt: skip
    return GPT2LMHeadModel._from_config(config, dtype=torch.bfloat16).eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, ids 1 to 256; 0 begins and ends a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0} | {letter: index for index, letter in enumerate(alphabet, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def save(model: PreTrainedModel, folder: Path, shard: str = "50GB") -> Path:
    """Model and tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            tensors |= {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    return tensors


def edit_config(folder: Path, **changes) -> None:
    """Changes keys of `config.json`; None removes one."""
    path = folder / "config.json"
    config = {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}
    path.write_text(json.dumps(config))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory) -> None:
    """What effllm keeps between runs is kept for these tests alone."""
    os.environ["EFFLLM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A tied tiny Llama on disk. Shared: tests that change it work on a copy."""
    return save(tiny_llama(), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """Token ids [2, 17]."""
    return torch.randint(1, 257, (2, 17), generator=torch.Generator().manual_seed(0))
