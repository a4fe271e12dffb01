"""Tensors that wait on disk: hidden states between a streamed forward and its backward."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor

from effllm.checkpoint.tensors import read_tensors, write_tensors
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
        write_tensors(file, {"tensor": tensor})
        return file

    def read(self, file: Path, device: torch.device) -> Tensor:
        """What `write` stored."""
        return read_tensors(file, device)["tensor"]
