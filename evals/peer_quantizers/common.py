"""What every peer's script shares: the job it reads, the decoder's Linears, the dense folder and report it writes."""

from __future__ import annotations

import json
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel


@dataclass
class Job:
    """One run of one peer, as `evals/peers.py` describes it."""

    model: Path
    out: Path
    calibration: Path
    settings: dict[str, Any]
    cost: dict[str, float] = field(default_factory=dict)
    started: tuple[float, float] = (0.0, 0.0)

    def load(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """The original model."""
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype).eval()

    def tokens(self) -> Tensor:
        """Calibration token ids `[samples, length]`."""
        return load_file(self.calibration)["input_ids"]

    def packed(self) -> Path:
        """Where a peer may save its own checkpoint."""
        return self.out.with_name(f"{self.out.name}.packed")

    def done(self) -> None:
        """Ends the peer's own work, model loaded and all layers quantised: what follows reads the weights back."""
        wall, cpu = self.started
        self.cost = {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": cpu_seconds() - cpu,
            "peak_memory_bytes": peak_memory(),
        }


@dataclass(frozen=True)
class Compressed:
    """The weight that a compressed layer computes with, and the bits that are stored for it."""

    weight: Tensor
    bits: float


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The decoder's Linears by name, the head left out."""
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear and ".layers." in name}


def stored_bits(*tensors: Tensor | None) -> int:
    """Bits that the given tensors take as they are stored."""
    return sum(8 * tensor.nbytes for tensor in tensors if tensor is not None)


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the checkpoint that a peer saved."""
    files = sorted(folder.rglob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def of_layer(tensors: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
    """The tensors that are stored for one layer, by the rest of their names."""
    prefix = f"{layer}."
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def unpacked(words: Tensor, bits: int) -> Tensor:
    """The codes `[32 * n / bits, ...]` that int32 words `[n, ...]` hold one after another, lowest bits first."""
    single = (words.unsqueeze(1) >> torch.arange(32).view(1, -1, *[1] * (words.dim() - 1))) & 1
    codes = single.flatten(0, 1).unflatten(0, (-1, bits))
    return (codes << torch.arange(bits).view(1, -1, *[1] * (words.dim() - 1))).sum(1)


def gptq_layer(stored: dict[str, Tensor], columns: int, zero_offset: int) -> Compressed:
    """A layer as GPTQ's checkpoints hold it: `qweight`, `qzeros`, `scales` and perhaps `g_idx`.

    The width and the group size follow from the shapes, so mixed widths are read too; a layer that was left alone has a
    `weight`. `zero_offset` is added to the zero points: 1 in the first version of the format.
    """
    if "weight" in stored:
        return Compressed(stored["weight"].float(), stored_bits(*stored.values()))
    bits = 32 * len(stored["qweight"]) // columns
    scales = stored["scales"].float()
    zeros = unpacked(stored["qzeros"].t(), bits).t() + zero_offset
    groups = stored.get("g_idx", torch.arange(columns) // -(-columns // len(scales))).long()
    weight = (unpacked(stored["qweight"], bits) - zeros[groups]) * scales[groups]
    return Compressed(weight.t().contiguous(), stored_bits(*stored.values()))


@torch.no_grad()
def read_weight(layer: nn.Module, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight `[out, in]` of any bias-free linear layer, read by running it on the identity."""
    return layer(torch.eye(columns, dtype=dtype)).t().float().contiguous()


def smallest_exact(weight: Tensor) -> Tensor:
    """`weight` in bf16 where that holds every value exactly, else in fp32."""
    half = weight.to(torch.bfloat16)
    return half if torch.equal(half.float(), weight.float()) else weight.float()


def write_dense(model: Path, out: Path, weights: dict[str, Tensor]) -> None:
    """Copies the model folder with `weights`, by module name, in place of its own."""
    out.mkdir(parents=True, exist_ok=True)
    left = {f"{name}.weight": weight for name, weight in weights.items()}
    for file in sorted(path for path in model.iterdir() if path.is_file()):
        if file.suffix != ".safetensors":
            shutil.copy(file, out)
            continue
        tensors = load_file(file)
        for name in left.keys() & tensors.keys():
            weight = left.pop(name)
            if weight.shape != tensors[name].shape or not weight.isfinite().all():
                raise ValueError(f"{name}: the peer's weight has another shape or values that are not finite")
            tensors[name] = smallest_exact(weight).contiguous()
        save_file(tensors, out / file.name, metadata={"format": "pt"})
    if left:
        raise ValueError(f"the model folder holds no tensor {min(left)}")


def cpu_seconds() -> float:
    """CPU seconds of this process and of the children that ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(part.ru_utime + part.ru_stime for part in usage)


def peak_memory() -> int:
    """Peak resident bytes of this process, without what the parent held when it started this one."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def run(compress: Callable[[Job], dict[str, Compressed]], *packages: str) -> None:
    """Runs `compress` on the job file named on the command line; writes the dense folder and the report beside it."""
    raw = json.loads(Path(sys.argv[1]).read_text())
    paths = {name: Path(raw[name]) for name in ("model", "out", "calibration")}
    job = Job(**paths, settings=raw["settings"], started=(time.perf_counter(), cpu_seconds()))
    torch.manual_seed(0)
    layers = compress(job)
    if missing := linears(job.load()).keys() - layers.keys():
        raise ValueError(f"{min(missing)} was not compressed")
    write_dense(job.model, job.out, {name: layer.weight for name, layer in layers.items()})
    report = {
        "bits": sum(layer.bits for layer in layers.values()) / sum(layer.weight.numel() for layer in layers.values()),
        "layers": len(layers),
        **job.cost,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", *packages)},
        },
    }
    (job.out / "report.json").write_text(json.dumps(report, indent=1))
