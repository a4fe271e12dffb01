"""Every preset on a real model: EFFLLM_REAL_MODEL names a Hugging Face folder (a causal language model)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from conftest import read_tensors
from transformers import AutoModelForCausalLM

import effllm
from effllm.measure.result import Result
from effllm.plans import presets

FOLDER = os.environ.get("EFFLLM_REAL_MODEL", "")
pytestmark = [pytest.mark.real_model, pytest.mark.skipif(not FOLDER, reason="EFFLLM_REAL_MODEL is not set")]
RELOAD = """
import sys, torch, effllm
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
tokens = torch.load(sys.argv[2])
one = AutoModelForCausalLM.from_pretrained(sys.argv[1])(tokens).logits
assert torch.equal(one, effllm.load(sys.argv[1])(tokens).logits)
torch.save(one, sys.argv[3])
"""


def python(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.mark.parametrize("preset", list(presets()))
def test_preset_through_the_command_line(preset, tmp_path):
    """Folder and live routes write equal tensors; reloaded in a fresh process, logits are bit-equal to the live model's."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "effllm.cli", "compress", FOLDER, "--plan", preset, "--out", str(out)]
    done = subprocess.run(
        [*command, "--threads", "1", "--no-check", "--json"], check=True, capture_output=True, text=True
    )
    result = Result.model_validate_json(done.stdout)
    assert result.stored_bytes == sum(file.stat().st_size for file in out.glob("*.safetensors"))

    live = effllm.compress(AutoModelForCausalLM.from_pretrained(FOLDER), preset)
    live.save_pretrained(tmp_path / "live")
    one, other = read_tensors(out), read_tensors(tmp_path / "live")
    assert one.keys() == other.keys()
    assert all(one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one)

    tokens = torch.randint(10, 1000, (1, 24), generator=torch.Generator().manual_seed(0))
    torch.save(tokens, tmp_path / "tokens.pt")
    python(RELOAD, str(out), str(tmp_path / "tokens.pt"), str(tmp_path / "logits.pt"))
    assert torch.equal(torch.load(tmp_path / "logits.pt"), live(tokens).logits)
