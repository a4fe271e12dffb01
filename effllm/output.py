"""The folder that a streamed compression writes: it grows beside its place, and takes it once it is complete."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

import effllm
from effllm import hf
from effllm.checkpoint import INDEX, Checkpoint, read_config, read_header
from effllm.data.text import text_identity
from effllm.errors import EffllmError
from effllm.journal import edit_entries, edits_in, entries, shapes
from effllm.method import Codec
from effllm.plans import Plan
from effllm.resume import run_key
from effllm.shards import clear
from effllm.site import Site, untied
from effllm.source import Source


@dataclass(frozen=True)
class Output:
    """The folder `path` that one compression fills: what is asked for, and the files beside the shards."""

    path: Path
    name: str
    """Of the model, as it was asked for."""
    checkpoint: Checkpoint
    plan: Plan
    dtype: torch.dtype
    """Of the arithmetic and of tensors left as they are."""
    threads: int
    overwrite: bool

    @property
    def partial(self) -> Path:
        """Where it grows until it is complete."""
        return self.path.with_name(self.path.name + ".partial")

    @cached_property
    def key(self) -> str:
        """Identifies the output's bytes: source, plan, dtype, version, and threads where floats are summed."""
        data = self.plan.needs_data
        return run_key(
            source=self.checkpoint.identity(),
            plan=self.plan.model_dump(mode="json", exclude={"name", "description"}),
            dtype=str(self.dtype),
            version=effllm.__version__,
            threads=self.threads if data else None,
            text=[text_identity(text) for text in self.plan.calibration.sources] if data else None,
        )

    def exists(self) -> bool:
        """Whether `path` is this very output.

        Raises:
            EffllmError: it holds something else, and not an effllm model that is to be overwritten.
        """
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return False
        config = read_config(self.path) if (self.path / "config.json").is_file() else {}
        found = config.get("quantization_config") or {}
        if found.get("quant_method") != "effllm":
            raise EffllmError(f"{self.path} holds something that effllm did not write; choose another --out")
        if self.overwrite:
            return False
        if (found.get("source") or {}).get("key") != self.key:
            raise EffllmError(
                f"{self.path} holds another effllm model; pass --overwrite to replace it, or another --out"
            )
        return True

    def check_disk(self, needed: int) -> None:
        """Raises EffllmError where the disk has no room for `needed` bytes, less what is written already."""
        done = sum(file.stat().st_size for file in self.partial.glob("*.safetensors")) if self.partial.exists() else 0
        existing = next(parent for parent in self.path.parents if parent.exists())
        free = shutil.disk_usage(existing).free
        if needed - done > free:
            raise EffllmError(
                f"{existing} has {free / 1e6:,.1f} MB free, and the output needs up to {(needed - done) / 1e6:,.1f} MB "
                "more; free some, or choose another --out"
            )

    @contextlib.contextmanager
    def explain_full_disk(self) -> Iterator[None]:
        """While it is open, an OSError of a full disk says what to do."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise EffllmError(
                f"no room left in {self.path.parent} ({os.strerror(error.errno)}); free some and give the same command: "
                f"what is finished in {self.partial.name} is kept"
            ) from None

    def write_index(self, files: list[Path]) -> None:
        headers = {file.name: read_header(file) for file in files}
        total = sum(tensor.nbytes for header in headers.values() for tensor in header.values())
        weight_map = {name: file for file, header in headers.items() for name in header}
        _write_json(
            self.partial / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        )

    def write_config(self, sites: list[Site], assigned: dict[str, Codec], checksums: str) -> None:
        config = {k: v for k, v in self.checkpoint.config.items() if k not in ("torch_dtype", "auto_map")}
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        quantization = hf.EffllmConfig(
            entries(assigned),
            shapes(sites, assigned),
            plan=self.plan.model_dump(mode="json", exclude_defaults=True),
            source={"model": self.name, "key": self.key},
            checksums=checksums,
            edits=edit_entries([*edits_in(self.checkpoint.config), *self.plan.edits()]),
        )
        _write_json(self.partial / "config.json", {**config, "quantization_config": quantization.to_dict()})

    def publish(self) -> None:
        """Gives the finished folder its name. The earlier output, if any, is gone only after that."""
        for stray in self.partial.glob("*.tmp"):
            clear(stray)
        for file in self.partial.iterdir():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
        if self.overwrite and self.path.exists():
            old = Path(tempfile.mkdtemp(prefix=self.path.name + ".old-", dir=self.path.parent))
            self.path.rename(old)
            self.partial.rename(self.path)
            shutil.rmtree(old)
        else:
            self.partial.rename(self.path)


def largest_bytes(source: Source, options: dict[str, tuple[Codec, ...]]) -> int:
    """An upper bound of the output's tensor bytes: each site at the largest option that the plan may choose."""
    state = untied(source.model, source.sites)
    total: int = sum(tensor.nbytes for tensor in state.values())
    for site in source.sites:
        if site.name in options:
            dense = site.size * state[site.parameter].itemsize
            total += max(codec.stored_bytes(site.shape) for codec in options[site.name]) - dense
    return total


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
