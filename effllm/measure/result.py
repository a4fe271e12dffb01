"""The Result: one measured run as one JSON document. Everything that measures writes this and nothing else."""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from effllm.checkpoint import Checkpoint
from effllm.checkpoint.skeleton import skeleton, stored_dtype
from effllm.hf import EffllmConfig
from effllm.journal import codecs, restore_structure
from effllm.site import find_sites, select


class Result(BaseModel):
    """One measured run. A figure that was not measured is null; `*_stderr` is its error, `*_tokens` or `_images` a count."""

    model_config = ConfigDict(extra="forbid")
    schema_version: Literal[1] = 1
    command: Literal["compress", "eval"]
    message: str = ""
    model: str
    model_digest: str
    """SHA-256 over the bytes of the weight files."""
    base_model: str | None = None
    baseline: str | None = None
    """The model that `kl`, `top1_agreement` and the `baseline_*` figures compare with."""
    plan: dict[str, Any] = {}
    stored_bytes: int
    """Bytes of all weight files on disk, headers included."""
    bits_per_weight: float
    """Stored bits, everything counted, per weight of all sites that the plan does not exclude, embeddings included."""
    text: list[str] = []
    sequence_length: int | None = None
    perplexity: float | None = None
    perplexity_stderr: float | None = None
    perplexity_tokens: int | None = None
    baseline_perplexity: float | None = None
    images: list[str] = []
    accuracy: float | None = None
    """Share of images whose class the model ranks first."""
    accuracy_stderr: float | None = None
    accuracy_images: int | None = None
    """Images measured, of `kl` and `top1_agreement` too."""
    baseline_accuracy: float | None = None
    accuracy_change: float | None = None
    """Accuracy minus the baseline's; its error is over images, paired."""
    accuracy_change_stderr: float | None = None
    kl: float | None = None
    """KL divergence from the baseline's next-token (class) distribution to the model's, nats per token (image)."""
    kl_stderr: float | None = None
    predicted_kl: float | None = None
    """What `compress` expected of `kl` before the work, from the calibration data."""
    kl_tokens: int | None = None
    top1_agreement: float | None = None
    """Share of tokens (images) at which model and baseline rank the same token (class) first."""
    top1_agreement_stderr: float | None = None
    top1_agreement_tokens: int | None = None
    peak_memory_bytes: int | None = None
    """Peak resident memory of a fresh process that loads the model and generates, or classifies images."""
    tokens_per_second: float | None = None
    tokens_per_second_tokens: int | None = None
    images_per_second: float | None = None
    """One image at a time, in that process."""
    images_per_second_images: int | None = None
    seconds: float | None = None
    """Wall clock of the command."""
    process_peak_memory_bytes: int | None = None
    """Peak resident memory of the process that ran the command."""
    machine: dict[str, Any]
    versions: dict[str, str]
    seed: int = 0

    def figures(self) -> list[tuple[str, float, float | None, str]]:
        """What was measured of the model's quality, as it is shown: label, value, standard error, over how much."""
        unit = "token" if self.accuracy is None else "image"
        tokens, images = f"{self.perplexity_tokens} tokens", f"{self.accuracy_images} images"
        over = tokens if self.accuracy is None else images
        rows = [
            ("accuracy", self.accuracy, self.accuracy_stderr, images),
            ("accuracy of the original", self.baseline_accuracy, None, images),
            ("change of accuracy", self.accuracy_change, self.accuracy_change_stderr, images),
            (f"KL to the original, nats per {unit}", self.kl, self.kl_stderr, over),
            ("KL that was predicted", self.predicted_kl, None, "calibration data"),
            ("perplexity", self.perplexity, self.perplexity_stderr, tokens),
            ("perplexity of the original", self.baseline_perplexity, None, tokens),
            ("top-1 agreement with the original", self.top1_agreement, self.top1_agreement_stderr, over),
        ]
        return [(label, value, error, over) for label, value, error, over in rows if value is not None]


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of `values` `[n]`, one a window or image; 0 for a single one."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0


def schema() -> str:
    """The JSON Schema of `Result`, as shipped in `result.schema.json`."""
    return json.dumps(Result.model_json_schema(), indent=2, sort_keys=True) + "\n"


def machine() -> dict[str, Any]:
    """What the run was measured on."""
    facts = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    return facts | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str]:
    """Versions of what computes."""
    packages = ("effllm", "torch", "transformers", "safetensors", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def peak_memory() -> int:
    """Peak resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count what the parent held when it started this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe_run(folder: Path, model: str, base_model: str | None, seconds: float) -> dict[str, Any]:
    """The fields of a Result that can be read off a model folder and this process."""
    checkpoint = Checkpoint.open(folder)
    ours = _journal(checkpoint)
    return {
        "model": model,
        "model_digest": checkpoint.digest(),
        "base_model": base_model or ours.source.get("model") if ours else None,
        "plan": ours.plan if ours else {},
        "stored_bytes": checkpoint.stored_bytes,
        "bits_per_weight": bits_per_weight(checkpoint),
        "seconds": seconds,
        "process_peak_memory_bytes": peak_memory(),
        "machine": machine(),
        "versions": versions(),
        "seed": torch.initial_seed(),
    }


def _journal(checkpoint: Checkpoint) -> EffllmConfig | None:
    ours = checkpoint.quantization.get("quant_method") == "effllm"
    return EffllmConfig(**checkpoint.quantization) if ours else None


def bits_per_weight(checkpoint: Checkpoint) -> float:
    """Stored bits per weight over all sites that the plan does not exclude, from the folder's config alone."""
    ours = _journal(checkpoint)
    dtype = stored_dtype(checkpoint)
    sites = find_sites(restore_structure(skeleton(checkpoint.config, dtype), checkpoint.config))
    assigned = codecs(ours.sites) if ours else {}
    excluded = {site.name for site in select(ours.plan.get("exclude", []), sites)} if ours else set()
    counted = [site for site in sites if site.name not in excluded]
    stored = sum(
        assigned[site.name].stored_bytes(site.shape) if site.name in assigned else site.size * dtype.itemsize
        for site in counted
    )
    return 8 * stored / sum(site.size for site in counted)
