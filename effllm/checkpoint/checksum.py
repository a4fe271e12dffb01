"""Checksums of stored tensors, so that a damaged file is an error that names the tensor and never a wrong model.

A folder carries one number a tensor: the CRC-32 of its name (UTF-8) followed by its bytes. All of them are kept as one
short text, the base64 of the ascending little-endian uint32s: a tensor whose number is not among them is damaged.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from effllm.checkpoint.folder import Checkpoint, StoredTensor
from effllm.errors import EffllmError

CHUNK = 1 << 22  # bytes read at once


def checksum(name: str, tensor: Tensor) -> int:
    """The checksum of a tensor as it is stored under `name`."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(data.numpy().data, zlib.crc32(name.encode()))


def to_text(checksums: Iterable[int]) -> str:
    """The form in which `config.json` holds checksums."""
    return base64.b64encode(np.unique(np.array(list(checksums), dtype="<u4")).tobytes()).decode()


def verify(checkpoint: Checkpoint, text: str) -> None:
    """Reads every tensor of a folder and compares it with the checksums that `config.json` holds.

    Raises:
        EffllmError: naming the first tensor that is damaged, or the text is no list of checksums.
    """
    try:
        known = set(np.frombuffer(base64.b64decode(text, validate=True), dtype="<u4").tolist())
    except (ValueError, TypeError):
        raise EffllmError(f"{checkpoint.folder / 'config.json'} holds no valid checksums; download it again") from None
    for tensor in checkpoint.tensors.values():
        if _stored_checksum(tensor) not in known:
            raise EffllmError(
                f"{tensor.file}: tensor {tensor.name!r} is not what was written (its checksum differs): the file is damaged "
                "or was changed; download it again"
            )


def _stored_checksum(tensor: StoredTensor) -> int:
    value = zlib.crc32(tensor.name.encode())
    with tensor.file.open("rb", buffering=0) as stream:
        stream.seek(tensor.start)
        for position in range(0, tensor.nbytes, CHUNK):
            value = zlib.crc32(stream.read(min(CHUNK, tensor.nbytes - position)), value)
    return value
