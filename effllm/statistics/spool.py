"""Tensors that wait on disk: hidden states between a streamed forward and its backward."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from effllm.errors import EffllmError


class Spool:
    """A folder of tensors, numbered in the order in which they are written."""

    def __init__(self, folder: Path):
        self.folder, self.count, self.nbytes = folder, 0, 0
        folder.mkdir(parents=True, exist_ok=True)

    def require(self, nbytes: int) -> None:
        """Refuses to start where the disk would fill up."""
        free = shutil.disk_usage(self.folder).free
        if nbytes > free:
            raise EffllmError(
                f"{self.folder} has {free / 1e9:.2f} GB free, and the hidden states of the calibration need "
                f"{nbytes / 1e9:.2f} GB; free some, set EFFLLM_CACHE to another disk, or take fewer --samples"
            )

    def write(self, tensor: Tensor) -> Path:
        """Stores `tensor` and returns where."""
        self.count += 1
        self.nbytes += tensor.nbytes
        file = self.folder / f"{self.count}.safetensors"
        save_file({"tensor": tensor.detach().cpu().contiguous()}, file)
        return file

    def read(self, file: Path, device: torch.device) -> Tensor:
        """What `write` stored."""
        with safe_open(file, framework="pt", backend="pread") as handle:
            tensor: Tensor = handle.get_tensor("tensor")
        return tensor.to(device)

    def keep(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Stores `tensors` under a name; the file is whole or absent."""
        write_tensors(self.folder / f"{name}.safetensors", tensors)

    def kept(self, name: str, device: torch.device) -> dict[str, Tensor]:
        """What `keep` stored."""
        with safe_open(self.folder / f"{name}.safetensors", framework="pt", backend="pread") as handle:
            return {key: handle.get_tensor(key).to(device) for key in handle.keys()}  # noqa: SIM118

    def drop(self, name: str) -> None:
        """Deletes what `keep` stored, if it is there."""
        (self.folder / f"{name}.safetensors").unlink(missing_ok=True)


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file that is whole or absent."""
    scratch = file.with_name(f".{file.name}.tmp")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, scratch)
    scratch.replace(file)
