"""A killed run resumes with the same command, and what comes out is the same to the byte.

The command line runs in processes of its own, forked from one that has imported everything: starting Python, torch and
transformers takes seconds, the compression of a tiny model a fraction of one.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import tiny_llama

import effllm
from effllm import cli

PATIENCE = 300.0  # seconds until a process counts as hung
IMPORTED_ONCE = [
    "pytest", "effllm.streaming", "effllm.report.tables", "transformers.models.auto.tokenization_auto",
    "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama",
]  # fmt: skip
LEFT_BY_A_KILL = {"journal.jsonl"}  # what may lie in a complete folder, besides locks, until the next command

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(IMPORTED_ONCE)

PLANS = {
    "without data": ["--plan", "uniform-4bit"],
    "by weights": ["--plan", "layerwise-4bit", "--score", "zd"],
    "by text": ["--calibration", "TEXT", "--samples", "4", "--sequence-length", "32", "--no-check"],
}


def command_line(arguments: list[str], log: Path, folder: Path, die_at: int | None, by: signal.Signals) -> None:
    """Runs the command line, its output in `log`; a signal hits it before the `die_at`-th file operation below `folder`."""
    with log.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    operations = 0

    def count(event: str, values: tuple) -> None:
        nonlocal operations
        if event.startswith(("open", "os.", "shutil.")) and any(
            isinstance(value, (str, os.PathLike)) and os.fspath(value).startswith(str(folder)) for value in values
        ):
            operations += 1
            if operations == die_at:
                os.kill(os.getpid(), by)

    if die_at is not None:
        sys.addaudithook(count)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    sys.argv = ["effllm", *arguments]
    cli.main()


class Ended(NamedTuple):
    """How a process ended: exit status (minus the signal), and what it printed."""

    status: int
    text: str


class Bench:
    """Compresses one model by one plan into folders named `out`, in processes that can be killed."""

    def __init__(self, source: Path, plan: list[str], home: Path):
        self.source, self.home = source, home
        self.arguments = ["compress", str(source), *plan]
        self.runs = 0
        self.halfway = 20  # file operations
        out = home / "wanted" / "out"
        process, log = self.start(out)
        wait_for(log.exists, process)
        began = time.monotonic()
        found = ended(process, log)
        assert found.status == 0, found.text
        self.seconds = time.monotonic() - began
        self.wanted = contents(out)

    def start(
        self, out: Path, *more: str, die_at: int | None = None, by: signal.Signals = signal.SIGKILL
    ) -> tuple[ForkServerProcess, Path]:
        self.runs += 1
        out.parent.mkdir(exist_ok=True)
        log = self.home / f"log-{self.runs}"
        arguments = [*self.arguments, "--out", str(out), *more]
        process = processes.Process(target=command_line, args=(arguments, log, out.parent, die_at, by))
        process.start()
        return process, log

    def run(self, out: Path, *more: str, **settings) -> Ended:
        return ended(*self.start(out, *more, **settings))

    def finish(self, out: Path, *more: str) -> dict[str, bytes]:
        """Runs to the end; the bytes of every file of the result."""
        found = self.run(out, *more)
        assert found.status == 0, found.text
        assert sorted(path.name for path in out.parent.iterdir()) == [out.name]
        return contents(out)

    def check_killed(self, out: Path) -> None:
        """After a kill, `out` is complete or does not exist."""
        if out.exists():
            found = contents(out)
            assert {name: data for name, data in found.items() if name in self.wanted} == self.wanted
            extra = found.keys() - self.wanted.keys() - LEFT_BY_A_KILL
            assert all(name.endswith(".lock") for name in extra)

    def unfinished(self, out: Path, *more: str) -> Path:
        """A run that was killed half-way; its folder."""
        units = len(list((self.home / "wanted" / "out").glob("*.safetensors")))
        partial = out.with_name("out.partial")
        for die_at in range(self.halfway, 1000, 10):
            assert self.run(out, *more, die_at=die_at).status == -signal.SIGKILL
            if 1 < len(list(partial.glob("*.safetensors"))) < units:
                self.halfway = die_at
                return partial
            shutil.rmtree(partial, ignore_errors=True)
        raise AssertionError("no kill hit the rewriting")


def ended(process: ForkServerProcess, log: Path) -> Ended:
    process.join(PATIENCE)
    assert process.exitcode is not None, f"still running: {log.read_text()}"
    return Ended(process.exitcode, log.read_text())


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of everything in a folder; a folder in it counts as empty."""
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in folder.iterdir()}


def wait_for(condition: Callable[[], bool], process: ForkServerProcess | subprocess.Popen) -> None:
    """Returns as soon as a condition holds or the process has ended."""
    alive = process.is_alive if isinstance(process, ForkServerProcess) else lambda: process.poll() is None
    while not condition() and alive():
        time.sleep(0.001)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Some text to calibrate on."""
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(" ".join(f"line {number} of a long tale," for number in range(200)))
    return file


@pytest.fixture(scope="module")
def benches(llama_folder, text, tmp_path_factory) -> Callable[[str], Bench]:
    made: dict[str, Bench] = {}

    def bench(plan: str) -> Bench:
        if plan not in made:
            arguments = [str(text) if argument == "TEXT" else argument for argument in PLANS[plan]]
            made[plan] = Bench(llama_folder, arguments, tmp_path_factory.mktemp("bench"))
        return made[plan]

    return bench


@pytest.fixture(params=list(PLANS))
def bench(request, benches) -> Bench:
    return benches(request.param)


def kill_at_random_moments(bench: Bench, out: Path, kills: int, seed: int) -> None:
    moments = random.Random(seed)
    for _ in range(kills):
        process, log = bench.start(out)
        wait_for(log.exists, process)
        time.sleep(moments.uniform(0, bench.seconds))
        process.kill()
        assert ended(process, log).status in (-signal.SIGKILL, 0)
        bench.check_killed(out)
    assert bench.finish(out) == bench.wanted


def test_killed_at_random_moments(bench, tmp_path):
    kill_at_random_moments(bench, tmp_path / "again" / "out", kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
def test_killed_at_many_random_moments(bench, tmp_path, seed):
    kill_at_random_moments(bench, tmp_path / "again" / "out", kills=4, seed=seed)


def kill_before_file_operations(bench: Bench, home: Path, numbers: range) -> None:
    for number in numbers:
        out = home / str(number) / "out"
        found = bench.run(out, die_at=number)
        bench.check_killed(out)
        if found.status == 0:
            return
        assert found.status == -signal.SIGKILL
        assert bench.finish(out) == bench.wanted, f"killed before file operation {number}"
    raise AssertionError(f"more file operations than {numbers.stop}: raise the range")


def test_killed_before_some_file_operations(benches, tmp_path):
    kill_before_file_operations(benches("without data"), tmp_path, range(3, 1000, 23))


@pytest.mark.slow
def test_killed_before_every_file_operation(bench, tmp_path):
    kill_before_file_operations(bench, tmp_path, range(1, 1000))


def test_killed_as_its_own_program(benches, tmp_path):
    bench, out = benches("by weights"), tmp_path / "again" / "out"
    command = [sys.executable, "-m", "effllm.cli", *bench.arguments, "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wait_for(out.with_name("out.partial").exists, process)
    time.sleep(random.Random(0).uniform(0, 0.1))
    process.kill()
    process.communicate(timeout=PATIENCE)
    bench.check_killed(out)
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    assert contents(out) == bench.wanted


def test_interrupted(benches, tmp_path):
    bench, out = benches("without data"), tmp_path / "again" / "out"
    found = bench.run(out, die_at=20, by=signal.SIGINT)
    assert found == (130, "effllm: interrupted; the same command resumes\n")
    assert not out.exists()
    assert bench.finish(out) == bench.wanted


def test_finished_output_is_left_as_it_is(bench):
    out = bench.home / "wanted" / "out"
    times = {path: path.stat().st_mtime_ns for path in [out, *out.iterdir()]}
    found = bench.run(out)
    assert found.status == 0 and "already done: nothing was changed" in found.text
    assert {path: path.stat().st_mtime_ns for path in [out, *out.iterdir()]} == times
    assert contents(out) == bench.wanted


def test_other_thread_count_is_refused_where_data_is_used(benches, tmp_path):
    bench, out = benches("by text"), tmp_path / "again" / "out"
    partial = bench.unfinished(out, "--threads", "1")
    before = contents(partial)
    found = bench.run(out, "--threads", "2")
    assert found.status == 1 and found.text.count("\n") == 1
    for part in (str(partial), "thread count", "finish it with its own command", "--overwrite"):
        assert part in found.text
    assert contents(partial) == before
    assert bench.finish(out, "--threads", "1") == bench.wanted


def test_other_thread_count_gives_the_same_bytes_without_data(benches, tmp_path):
    bench, out = benches("without data"), tmp_path / "again" / "out"
    bench.unfinished(out, "--threads", "1")
    assert bench.finish(out, "--threads", "2") == bench.wanted


def test_unfinished_run_of_another_plan(benches, tmp_path):
    bench, out = benches("without data"), tmp_path / "again" / "out"
    partial = bench.unfinished(out, "--exclude", "*.layers.0.*")
    found = bench.run(out)
    assert found.status == 1 and str(partial) in found.text and "another model, plan" in found.text
    assert bench.finish(out, "--overwrite") == bench.wanted, "--overwrite starts over"
    assert bench.finish(out, "--overwrite") == bench.wanted, "from a finished output too"


def test_leftovers_and_damage_in_an_unfinished_folder(benches, tmp_path):
    bench, out = benches("without data"), tmp_path / "again" / "out"
    partial = bench.unfinished(out)
    first, *_ = sorted(partial.glob("*.safetensors"))
    damaged = bytearray(first.read_bytes())
    damaged[-1] ^= 1
    first.write_bytes(damaged)
    (partial / "model-00099-of-00099.safetensors.tmp").write_bytes(b"torn")
    *_, before, last = sorted(name for name in bench.wanted if name.endswith(".safetensors"))
    (partial / f"{before}.tmp").write_bytes(b"torn")
    (partial / f"{last}.tmp").mkdir()
    (partial / f"{last}.tmp" / ".tmpA1b2C3").write_bytes(b"torn")
    (partial / "config.json").write_text("{")
    with (partial / "journal.jsonl").open("a") as journal:
        journal.write('\n{"kind": "unit", "name": "model.lay')
    assert bench.finish(out) == bench.wanted


def test_two_processes_share_the_work(bench, tmp_path):
    for number in range(2):
        out = tmp_path / str(number) / "out"
        both = [bench.start(out), bench.start(out)]
        for process, log in both:
            found = ended(process, log)
            assert found.status == 0, found.text
        assert contents(out) == bench.wanted
        assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


def test_one_of_two_processes_is_killed(benches, tmp_path):
    bench, out = benches("by text"), tmp_path / "again" / "out"
    killed, other = bench.start(out), bench.start(out)
    wait_for(killed[1].exists, killed[0])
    time.sleep(random.Random(0).uniform(0, bench.seconds / 2))
    killed[0].kill()
    assert ended(*killed).status in (-signal.SIGKILL, 0)
    found = ended(*other)
    assert found.status == 0, found.text
    assert contents(out) == bench.wanted


def test_resumed_output_computes_what_the_live_model_computes(benches, tmp_path, tokens):
    bench, out = benches("without data"), tmp_path / "again" / "out"
    bench.unfinished(out)
    bench.finish(out)
    with torch.no_grad():
        resumed = effllm.load(out)(tokens).logits
        assert torch.equal(resumed, effllm.compress(tiny_llama(), "uniform-4bit")(tokens).logits)
