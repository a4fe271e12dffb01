"""Other weight compressors against effllm: size, distance to the original and cost, on one model.

    python evals/peers.py MODEL_FOLDER --out results/peers.json

Every peer has a script in `peer_quantizers/` and a virtual environment of its own with pinned versions. It compresses
the decoder's Linears only, is calibrated on the package's calibration slice, and writes a dense folder of the weights
it would compute with. All folders are then measured alike, in float32, on the package's held-out text. Bits count all
that the peer stores for those Linears, read from its tensors or its checkpoint; seconds and CPU seconds run from
loading the model to the last quantised layer.

OUT is a JSON document, written after every row; rows that stand are skipped by a rerun, failed ones are tried again. The
table goes to stdout, the plot beside OUT. `--match` adds effllm at the bits of every peer, with paired differences.
See docs/peers.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peer_quantizers.reference import Reference
from peer_quantizers.report import Row, plot, table
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import effllm
from effllm.checkpoint import Checkpoint
from effllm.data.text import EVALUATION_TEXTS, load_tokenizer, token_windows
from effllm.layers.placing import decode_all
from effllm.measure.evaluate import Comparison
from effllm.measure.result import machine, versions

SCRIPTS = Path(__file__).with_name("peer_quantizers")


@dataclass(frozen=True)
class Peer:
    """One row: a library with pinned versions, its script, and the settings it is run with."""

    name: str
    script: str
    packages: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    build: str = ""
    """A source package whose copy of ggml is compiled into the environment."""
    own_torch: bool = False
    """Installs its own torch and transformers instead of sharing those that effllm runs on."""
    default: bool = True
    """Whether it runs without being named."""

    def facts(self) -> Row:
        """What a stored row must agree with to stand."""
        return {
            "script": self.script,
            "packages": [*self.packages, *filter(None, [self.build])],
            "settings": self.settings,
        }


def peers() -> list[Peer]:
    """Every peer, the quick ones first."""
    bnb, hqq, quanto = ("bitsandbytes==0.50.2",), ("hqq==0.2.8.post1",), ("optimum-quanto==0.2.7",)
    gptq, rounding = ("gptqmodel==7.7.0",), ("auto-round==0.16.1",)
    found = [
        Peer(f"NF4 b64{label}", "bitsandbytes", bnb, {"block": 64, "double_quant": double})
        for label, double in ((" double quant", True), ("", False))
    ]
    found += [Peer(f"HQQ {bits}-bit g64", "hqq", hqq, {"bits": bits, "group": 64}) for bits in (4, 3, 2)]
    found += [Peer(f"quanto {kind}", "quanto", quanto, {"type": kind}) for kind in ("qint4", "qint2")]
    found.append(Peer("torchao int4 g64", "torchao", ("torchao==0.18.0",), {"group": 64}))
    found += [
        Peer(f"llama.cpp {kind}", "llama_cpp", ("gguf==0.19.0",), {"type": kind}, build="llama-cpp-python==0.3.36")
        for kind in ("IQ4_XS", "Q4_K", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XS")
    ]
    found += [
        Peer(f"GPTQ {b}-bit g128", "gptqmodel", gptq, {"bits": b, "group": 128, "desc_act": True}, own_torch=True)
        for b in (4, 3, 2)
    ]
    for label, settings, default in (
        ("50 iterations", {"iters": 50, "batch": 4}, True),
        ("defaults", {"iters": 200, "batch": 8}, False),
    ):
        found += [
            Peer(f"AutoRound {b}-bit g128 {label}", "auto_round", rounding, {"bits": b, "group": 128, **settings},
                 default=default)
            for b in (3, 4, 2)
        ]  # fmt: skip
    options = ["W2A16", "W3A16", "W4A16", "W5A16", "W6A16", "W8A16"]
    found += [
        Peer(f"AutoRound AutoScheme {average} bits, 50 iterations", "auto_round", rounding,
             {"average": average, "options": options, "iters": 50, "batch": 4})
        for average in (3.15, 2.5)
    ]  # fmt: skip
    found += [
        Peer(
            f"llm-compressor GPTQ {b}-bit g128",
            "llm_compressor",
            ("llmcompressor==0.14.0.1",),
            {"bits": b, "group": 128},
        )
        for b in (4, 3)
    ]
    return found


class Failed(Exception):
    """A peer could not be installed or run; the message is its last error line."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the original model")
    parser.add_argument("--out", type=Path, required=True, help="the JSON document to write or go on with")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="only rows whose name contains a NAME")
    parser.add_argument("--work", type=Path, default=Path.home() / ".cache" / "effllm-peers", help="environments, runs")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=33, help="of held-out text; 33 x 512 predict 16,863 tokens")
    parser.add_argument("--budgets", type=float, nargs="*", default=[2.25, 3.25, 4.25], help="effllm's bits per weight")
    parser.add_argument("--match", action="store_true", help="run effllm at every peer's bits too")
    parser.add_argument(
        "--also", type=Path, nargs="*", default=[], help="documents of other runs whose rows are taken over"
    )
    parser.add_argument("--defaults", action="store_true", help="run the peers' slow default settings too")
    parser.add_argument("--timeout", type=float, default=3 * 3600, help="seconds a row may take")
    args = parser.parse_args()
    bench = Bench(args)
    bench.take_over(args.also)
    for peer in peers():
        if bench.wanted(peer.name) and (peer.default or args.defaults):
            bench.add(peer.name, peer.facts(), lambda peer=peer: run_peer(peer, bench))
    budgets = set(args.budgets)
    if args.match:
        budgets |= {math.floor(100 * row["bits"]) / 100 for row in bench.rows if "bits" in row and "budget" not in row}
    for budget in sorted(budgets):
        name = f"effllm {budget:.4g} bits"
        if bench.wanted(name):
            bench.add(name, {"budget": budget}, lambda budget=budget: run_effllm(budget, bench))
    print(table(bench.rows))
    plot(bench.rows, args.out.with_suffix(".png"))


class Bench:
    """The original, the text and the rows so far."""

    def __init__(self, args: argparse.Namespace):
        self.model, self.out, self.work = args.model.resolve(), args.out, args.work.resolve()
        self.only, self.timeout = args.only, args.timeout
        tokenizer, length = load_tokenizer(self.model), args.sequence_length
        self.calibration = token_windows(tokenizer, ["books"], args.samples, length)
        self.windows = token_windows(tokenizer, ["default"], args.windows, length, EVALUATION_TEXTS)
        self.setting = {
            "model_digest": Checkpoint.open(self.model).digest(),
            "samples": len(self.calibration),
            "sequence_length": length,
            "windows": len(self.windows),
            "text": hashlib.sha256(self.calibration.numpy().tobytes() + self.windows.numpy().tobytes()).hexdigest(),
        }
        self.rows = read_rows(self.out, self.setting)

    def wanted(self, name: str) -> bool:
        """Whether `--only` lets a row through."""
        return not self.only or any(part.lower() in name.lower() for part in self.only)

    def add(self, name: str, facts: Row, work: Any) -> None:
        """Does and stores one row, unless it stands already."""
        if any(stands(row, name, facts) for row in self.rows):
            return
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            row = work()
        except (Failed, OSError, ValueError, RuntimeError) as error:
            row = {"error": " ".join(str(error).split())[:300]}
        self.rows = [old for old in self.rows if old["name"] != name] + [{"name": name, **facts, **row}]
        self.write()

    def take_over(self, documents: list[Path]) -> None:
        """Adds the measured rows of other runs on the same model and text; rows of the same name are replaced."""
        for path in documents:
            found = [row for row in read_rows(path, self.setting) if "error" not in row]
            names = {row["name"] for row in found}
            self.rows = [row for row in self.rows if row["name"] not in names] + found
            self.write()

    def write(self) -> None:
        """Stores all rows."""
        document = {**self.setting, "machine": machine(), "versions": versions(), "rows": self.rows}
        write_atomically(self.out, json.dumps(document, indent=1))

    @cached_property
    def reference(self) -> Reference:
        """The original on the held-out text, computed when the first row is measured."""
        key = json.dumps(self.setting)
        return Reference(dense(self.model), self.windows, self.work / "reference.safetensors", key)

    def measure(self, model: PreTrainedModel) -> Row:
        """The quality of a dense model, with the values of every window."""
        found = self.reference.compare(model)
        return found.figures() | per_window(found)


def dense(folder: Path) -> PreTrainedModel:
    """An ordinary model folder, computed in float32."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model


def per_window(found: Comparison) -> Row:
    """Loss, KL and top-1 agreement of each window, so that two rows can be compared in pairs."""
    columns = {"window_nll": found.nll, "window_kl": found.kl, "window_agreement": found.agreement}
    return {name: column.tolist() for name, column in columns.items() if column is not None}


def stands(row: Row, name: str, facts: Row) -> bool:
    """Whether a stored row answers for this run: measured, with the same settings."""
    return row["name"] == name and "error" not in row and all(row.get(key) == value for key, value in facts.items())


def read_rows(out: Path, setting: Row) -> list[Row]:
    """The rows of an earlier run.

    Raises:
        SystemExit: they were measured on another model or other text.
    """
    if not out.exists():
        return []
    document = json.loads(out.read_text())
    if {key: document.get(key) for key in setting} != setting:
        raise SystemExit(f"{out} was measured with another model or other text; give another --out")
    return list(document["rows"])


def write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def run_peer(peer: Peer, bench: Bench) -> Row:
    """Installs and runs a peer, then measures what it made; what it made is kept until it is measured."""
    python = environment(peer, bench.work / "venvs", bench.timeout)
    folder = bench.work / "runs" / re.sub(r"\W+", "-", peer.name)
    job = {
        "model": str(bench.model),
        "out": str(folder / "dense"),
        "calibration": str(folder / "calibration.safetensors"),
        "settings": peer.settings,
        "setting": bench.setting,
    }
    report, described = folder / "dense" / "report.json", folder / "job.json"
    if not (report.exists() and json.loads(described.read_text()) == job):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        save_file({"input_ids": bench.calibration}, folder / "calibration.safetensors")
        described.write_text(json.dumps(job))
        call([str(python), str(SCRIPTS / f"with_{peer.script}.py"), str(described)], bench.timeout)
    row: Row = json.loads(report.read_text()) | bench.measure(dense(folder / "dense"))
    shutil.rmtree(folder)
    return row


def run_effllm(budget: float, bench: Bench) -> Row:
    """Compresses with effllm's command line to `budget` bits per weight, then measures what it made."""
    with tempfile.TemporaryDirectory(prefix="effllm-peer-") as scratch:
        out = Path(scratch) / "packed"
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        started = time.perf_counter()
        command = [sys.executable, "-m", "effllm.cli", "compress", str(bench.model), "--budget", f"{budget}bpw"]
        command += ["--exclude", "model.embed_tokens", "--calibration", "books", "--out", str(out), "--json"]
        samples, length = bench.calibration.shape
        command += ["--samples", str(samples), "--sequence-length", str(length), "--no-check"]
        printed = json.loads(call(command, bench.timeout))
        seconds = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        row = {
            "bits": printed["bits_per_weight"],
            "seconds": seconds,
            "cpu_seconds": spent,
            "peak_memory_bytes": printed["process_peak_memory_bytes"],
            "versions": printed["versions"],
            "plan": printed["plan"],
        }
        return row | bench.measure(decode_all(effllm.load(out, dtype=torch.float32)))


def environment(peer: Peer, venvs: Path, timeout: float) -> Path:
    """The Python of a peer's virtual environment, made once; a stamp names what is installed in it."""
    folder = venvs / peer.script
    python, stamp = folder / "bin" / "python", folder / "installed.json"
    wanted = json.dumps({**asdict(peer), "name": "", "settings": {}, "default": True})
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    call([sys.executable, "-m", "venv", str(folder)], timeout)
    if not peer.own_torch:
        shared = next(path for path in sys.path if (Path(path) / "torch").is_dir())
        next(folder.glob("lib/python*/site-packages")).joinpath("shared.pth").write_text(shared)
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    extra = ["safetensors", "accelerate", "transformers==5.24.0"] if peer.own_torch else []
    call([*pip, "install", *peer.packages, *extra], timeout)
    if peer.build:
        with tempfile.TemporaryDirectory() as scratch:
            build_ggml(peer.build, pip, Path(scratch), folder / "lib", timeout)
    write_atomically(stamp, wanted)
    return python


def build_ggml(package: str, pip: list[str], scratch: Path, into: Path, timeout: float) -> None:
    """Compiles ggml's quantisers out of a source package of llama-cpp-python; needs cmake and a compiler."""
    call([*pip, "download", "--no-deps", "--no-binary", ":all:", "--dest", str(scratch), package], timeout)
    archive = next(scratch.glob("*.tar.gz"))
    shutil.unpack_archive(archive, scratch, filter="data")
    source, build = next(scratch.glob("*/vendor/llama.cpp")), scratch / "build"
    off = (
        "GGML_CPU",
        "LLAMA_OPENSSL",
        "LLAMA_BUILD_COMMON",
        "LLAMA_BUILD_TESTS",
        "LLAMA_BUILD_EXAMPLES",
        "LLAMA_BUILD_TOOLS",
    )
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", *(f"-D{name}=OFF" for name in off)]
    call(["cmake", "-S", str(source), "-B", str(build), *options], timeout)
    call(["cmake", "--build", str(build), "--target", "ggml-base"], timeout)
    shutil.copy(next(path for path in build.rglob("libggml-base.*") if path.is_file()), into / "libggml-base.so")


def call(command: list[str], timeout: float) -> str:
    """What a command prints; it and all it started are ended when the time is up."""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True) as process,
    ):
        try:
            printed, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise Failed(f"took longer than {timeout:.0f} s") from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        if process.returncode:
            errors.seek(0)
            lines = [line.strip() for line in (errors.read() or printed).splitlines() if line.strip()]
            raise Failed(lines[-1][:300] if lines else f"ended with code {process.returncode}")
    return printed


if __name__ == "__main__":
    main()
