"""Small files of tensors that effllm keeps for itself, beside the shards of a model."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file that is whole or absent."""
    scratch = file.with_name(f".{file.name}.tmp")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, scratch)
    scratch.replace(file)


def read_tensors(file: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """What `write_tensors` wrote; read with pread, not through a mapping that counts as resident."""
    with safe_open(file, framework="pt", backend="pread") as handle:
        return {key: handle.get_tensor(key).to(device) for key in handle.keys()}  # noqa: SIM118
