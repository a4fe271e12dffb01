"""A checkpoint on disk: where a model's files are, what their headers say, and whether they can be trusted.

Only safetensors are read. Everything here works on headers; no weight is touched.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from effllm.errors import EffllmError, UsageError, nearest

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
LARGEST_HEADER = 100_000_000
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
BITS = {
    "F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8, "BOOL": 8, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as its safetensors header describes it."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    start: int
    """Where its bytes begin in the file."""


@dataclass(frozen=True)
class Checkpoint:
    """A model folder: its `config.json` and the tensors of its safetensors files."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Reads config and headers, and checks that every file is whole.

        Raises:
            EffllmError: no config, no safetensors, a pickle checkpoint, a missing or truncated shard, a corrupt header,
                an index that names a path outside the folder.
        """
        config = read_config(folder)
        tensors: dict[str, StoredTensor] = {}
        for file, names in _weight_files(folder).items():
            found = read_header(file)
            missing = names - found.keys()
            if missing:
                raise EffllmError(
                    f"{file}: the index names tensor {sorted(missing)[0]!r}, which the file does not hold"
                )
            twice = sorted(found.keys() & tensors.keys())
            if twice:
                raise EffllmError(f"{file} and {tensors[twice[0]].file.name} both hold tensor {twice[0]!r}; remove one")
            tensors.update(found)
        if not tensors:
            raise EffllmError(f"{folder} holds no tensor; download its weight files again")
        return cls(folder, config, tensors)

    @property
    def files(self) -> list[Path]:
        """The weight files, sorted."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    @property
    def stored_bytes(self) -> int:
        """Bytes of all weight files on disk, headers included."""
        return sum(file.stat().st_size for file in self.files)

    def identity(self) -> str:
        """A digest of config, headers, file sizes and modification times: changes when the checkpoint does."""
        parts = [json.dumps(self.config, sort_keys=True)]
        parts += [f"{t.name} {t.dtype} {t.shape} {t.file.name}" for t in self.tensors.values()]
        parts += [f"{f.name} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in self.files]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def digest(self) -> str:
        """SHA-256 over the bytes of all weight files, in the order of their names."""
        total = hashlib.sha256()
        buffer = bytearray(1 << 22)
        for file in self.files:
            with file.open("rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    total.update(memoryview(buffer)[:count])
        return total.hexdigest()

    @property
    def quantization(self) -> dict[str, Any]:
        """What the config says of the quantization that the checkpoint already carries; empty where it carries none."""
        for config in (self.config, self.config.get("text_config") or {}):
            found = config.get("quantization_config") or config.get("compression_config")
            if found:
                return {"quant_method": "unknown", **found}
        return {}


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder as a dictionary."""
    path = folder / "config.json"
    if not path.is_file():
        raise EffllmError(f"{folder} holds no config.json; name a Hugging Face model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EffllmError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise EffllmError(f"{path} holds no JSON object")
    for key in ("text_config", "quantization_config", "compression_config"):
        if not isinstance(config.get(key) or {}, dict):
            raise EffllmError(f"{path}: {key} = {config[key]!r} is no JSON object; download it again")
    return config


def _weight_files(folder: Path) -> dict[Path, set[str]]:
    """Weight file -> tensor names that the index expects in it (none for a single file)."""
    index = folder / INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            expected: dict[Path, set[str]] = {}
            for name, file in weight_map.items():
                expected.setdefault(_inside(folder, file, index), set()).add(name)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError, AttributeError):
            raise EffllmError(
                f"{index} is no valid index: it must map tensor names to files under 'weight_map'"
            ) from None
        for file in expected:
            if not file.is_file():
                raise EffllmError(f"{index} names {file.name}, which is not in {folder}; download the missing shard")
        return expected
    if (folder / SINGLE).is_file():
        return {folder / SINGLE: set()}
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise EffllmError(
            f"{folder} holds {pickles[0]}, a pickle, which can run code when read; convert it where you trust it: "
            "from_pretrained(...) then save_pretrained(...) writes safetensors"
        )
    raise EffllmError(f"{folder} holds neither {SINGLE} nor {INDEX}")


def _inside(folder: Path, name: str, index: Path) -> Path:
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
        raise EffllmError(f"{index} names {name!r}, a path that leaves the folder; refused")
    return folder / name


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, after checking that the header is sound and the file complete.

    Raises:
        EffllmError: naming the file and what is wrong with it.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else LARGEST_HEADER + 1
        if length > min(LARGEST_HEADER, size - 8):
            raise EffllmError(
                f"{file} is no safetensors file, or truncated: its header does not fit in {size} bytes; download it again"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {}
        spans = []
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            bits = math.prod(shape) * BITS[entry["dtype"]]
            if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)) or (end - begin) * 8 != bits:
                raise EffllmError(
                    f"{file}: tensor {name!r} has shape {list(shape)}, but {end - begin} bytes; download it again"
                )
            tensors[name] = StoredTensor(name, file, entry["dtype"], shape, end - begin, 8 + length + begin)
            spans.append((begin, end, name))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError, ValueError, AttributeError):
        raise EffllmError(f"{file} has a corrupt safetensors header; download it again") from None
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise EffllmError(
                f"{file}: tensor {name!r} begins at byte {begin}, not at {position}: the header is corrupt; download it "
                "again"
            )
        position = end
    if 8 + length + position != size:
        raise EffllmError(
            f"{file} has {size} bytes, but its header describes {8 + length + position}: truncated or corrupt; "
            "download it again"
        )
    try:
        with safe_open(file, framework="pt", backend="pread"):
            return tensors
    except SafetensorError as error:
        raise EffllmError(f"{file} has a corrupt safetensors header ({error}); download it again") from None


@cache
def aliases() -> dict[str, dict[str, Any]]:
    """Short model names -> `{hub: hub id, config: config.json}`, so that a dry run works offline."""
    table: dict[str, dict[str, Any]] = yaml.safe_load(files("effllm").joinpath("aliases.yaml").read_text())
    return table


def resolve(model: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local folder of a model: a folder, `demo`, an alias or a hub id (downloaded: safetensors and text files only).

    Raises:
        UsageError: the name is no folder, no alias and cannot be a hub id.
        EffllmError: the hub cannot be reached, or does not have it.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    name = str(model)
    if name == "demo":
        return Path(str(files("effllm").joinpath("demo")))
    repository = aliases()[name]["hub"] if name in aliases() else name
    if path.is_file():
        raise UsageError(f"{name} is a file; name the model folder that holds it")
    if repository.count("/") != 1 or repository.startswith(("/", ".", "~")):
        raise UsageError(
            f"{name!r} is no folder, no alias and no hub id (owner/name): {nearest(name, ['demo', *aliases()])}"
        )
    return _download(repository, revision)


def _download(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "*.md"]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
    except HFValidationError as error:
        raise UsageError(f"{repository!r} is no valid hub id: {error}") from None
    except LocalEntryNotFoundError:
        raise EffllmError(
            f"cannot reach the hub for {repository!r} and it is not in the cache: check the network"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EffllmError(f"cannot download {repository!r} from the hub: {reason}") from None
