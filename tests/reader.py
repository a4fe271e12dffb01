"""A reader of packed folders, written from docs/format.md: numpy and safetensors, nothing of effllm or torch."""

from __future__ import annotations

import base64
import itertools
import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
from safetensors import safe_open


def read(folder: Path) -> dict[str, np.ndarray]:
    """Site -> its float32 matrix `[rows, columns]`, for every site of the journal."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "effllm" and config["format"] <= 1
    check(folder, config["checksums"])
    tensors = read_packed(folder)
    shape = {name: tuple(entry["shape"]) for entry in config["shapes"] for name in unfold(entry["sites"])}
    found = {}
    for entry in config["sites"]:
        maps, settings = entry["method"], entry["settings"]
        if "codec" in settings:
            ((method, settings),) = settings["codec"].items()
        assert maps in ("quantize", "hadamard", "awq") and (maps == "quantize" or method == "quantize")
        names = unfold(entry["sites"])
        for name in names:
            keys = [key for key in ("codes", "scale", "zero") if f"{name}.{key}" in tensors]
            stored = {key: tensors[f"{name}.{key}"] for key in keys}
            if keys and stored["codes"].ndim == 3:  # stacked experts, under the name of the first
                parameter = name.rpartition(".")[0]
                experts = sorted(int(n.rpartition(".")[2]) for n in names if n.rpartition(".")[0] == parameter)
                for position, expert in enumerate(experts):
                    one = {key: tensor[position] for key, tensor in stored.items()}
                    found[f"{parameter}.{expert}"] = undo(maps, tensors, name, decode(one, shape[name], **settings))
            elif keys:
                found[name] = undo(maps, tensors, name, decode(stored, shape[name], **settings))
    return found


def read_packed(folder: Path) -> dict[str, np.ndarray]:
    """Every stored integer and scale; the other tensors may have dtypes that numpy does not know."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "np") as handle:
            names = [name for name in handle.keys() if name.endswith((".codes", ".scale", ".zero", ".input_scale"))]  # noqa: SIM118
            tensors |= {name: handle.get_tensor(name) for name in names}
    return tensors


def check(folder: Path, checksums: str) -> None:
    known = set(np.frombuffer(base64.b64decode(checksums), "<u4").tolist())
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                begin, end = (8 + length + offset for offset in entry["data_offsets"])
                assert zlib.crc32(data[begin:end], zlib.crc32(name.encode())) in known, name


def unfold(patterns: list[str]) -> list[str]:
    names = []
    for pattern in patterns:
        words = re.split(r"\{([^}]*)\}", pattern)
        choices = [[word] for word in words]
        for index in range(1, len(words), 2):
            runs = [run.split("-") for run in words[index].split(",")]
            choices[index] = [str(n) for run in runs for n in range(int(run[0]), int(run[-1]) + 1)]
        names += ["".join(choice) for choice in itertools.product(*choices)]
    return names


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    stream = np.unpackbits(packed, axis=1, bitorder="little")[:, : count * bits]
    return stream.reshape(len(packed), count, bits) @ (1 << np.arange(bits))


def decode(stored: dict[str, np.ndarray], shape: tuple[int, int], bits, group_size, symmetric, **_) -> np.ndarray:
    columns = math.prod(shape) if group_size == "tensor" else shape[1]
    size = columns if isinstance(group_size, str) else min(group_size, columns)
    groups = -(-columns // size)
    zero = 2 ** (bits - 1) if symmetric else unpack(stored["zero"], bits, groups).repeat(size, 1)[:, :columns]
    scale = stored["scale"].astype(np.float32).repeat(size, 1)[:, :columns]
    return ((unpack(stored["codes"], bits, columns) - zero).astype(np.float32) * scale).reshape(shape)


def undo(maps: str, tensors: dict[str, np.ndarray], name: str, matrix: np.ndarray) -> np.ndarray:
    """The matrix for the inputs as they come, of one that was stored for rotated or scaled ones."""
    if maps == "awq":
        return matrix / tensors[f"{name}.input_scale"].astype(np.float32)
    if maps == "hadamard":
        columns = matrix.shape[1]
        size = min(columns & -columns, 64)
        block = np.ones((1, 1), np.float32)
        while len(block) < size:
            block = np.block([[block, block], [block, -block]])
        signs = [1 - 2 * (bin(j & j >> 1).count("1") % 2) for j in range(columns)]
        turned = matrix.reshape(len(matrix), -1, size) @ (block / np.sqrt(size, dtype=np.float32))
        return turned.reshape(matrix.shape) * np.array(signs, np.float32)
    return matrix
