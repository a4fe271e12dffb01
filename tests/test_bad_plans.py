"""Plans that are wrong, and wrong usage of the command line, are refused in one line that says what would work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import edit_config
from damage import EVERYTHING, PLAN, compress_refusal, refusal, run, says
from torch import nn

import effllm
from effllm import cli
from effllm.checkpoint.folder import SINGLE
from effllm.errors import UsageError
from effllm.plans import load_plan


@pytest.mark.parametrize(
    ("plan", "parts"),
    {
        "key of a plan": ({"stesp": EVERYTHING}, ["unknown key 'stesp'", "did you mean 'steps'?"]),
        "key of a step": ({"steps": [{"sites": ["*"], "usee": "quantize"}]}, ["'steps.0.usee'", "did you mean 'use'?"]),
        "key of the calibration": ({"steps": EVERYTHING, "calibration": {"sampels": 3}}, ["sampels", "'samples'?"]),
        "method": ({"steps": [{"sites": ["*"], "use": "quantise:bits=4"}]}, ["'quantise'", "did you mean 'quantize'?"]),
        "score": (
            {"steps": [{"sites": ["*"], "order": "lin", "high": "quantize", "low": "quantize", "average_bits": 4}]},
            ["unknown score 'lin'", "did you mean 'lim'?"],
        ),
        "setting": ({"steps": [{"sites": ["*"], "use": "quantize:bit=4"}]}, ["'bit'", "did you mean 'bits'?"]),
        "width of 1": ({"steps": [{"sites": ["*"], "use": "quantize:bits=1"}]}, ["bits = '1'", "or equal to 2"]),
        "width of 9": ({"steps": [{"sites": ["*"], "use": {"quantize": {"bits": 9}}}]}, ["bits = 9", "or equal to 8"]),
        "width of 4.5": ({"steps": [{"sites": ["*"], "use": "quantize:bits=4.5"}]}, ["bits = '4.5'", "integer"]),
        "low above high": (
            {"steps": [{"sites": ["*"], "order": "zd", "high": "quantize:bits=2", "low": "quantize:bits=4",
                        "average_bits": 3}]},
            ["low below high", "4 and 2"],
        ),
        "average": (
            {"steps": [{"sites": ["*"], "order": "zd", "high": "quantize:bits=4", "low": "quantize:bits=2",
                        "average_bits": 5}]},
            ["average_bits = 5", "2 to 4"],
        ),
        "no layer": ({"steps": [{"sites": ["vision.*"], "use": "quantize"}]}, ["'vision.*'", "model.embed_tokens"]),
        "every layer excluded": ({"steps": EVERYTHING, "exclude": ["*"]}, ["plan custom matches no layer"]),
        "preset": ("unifrm-4bit", ["'unifrm-4bit'", "did you mean 'uniform-4bit'?"]),
    }.values(),
)  # fmt: skip
def test_plan(original, plan, parts):
    says(refusal(effllm.plan, original, plan, kind=UsageError), *parts)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("steps: [", ["not valid YAML"]),
        ("when: 2024-99-99", ["not valid YAML", "month must be in 1..12"]),
        ("[]", ["holds no plan", "'steps'"]),
        ("stesp: []", ["unknown key 'stesp'", "did you mean 'steps'?"]),
        ("#" * 1_000_001, ["larger than 1000000 bytes"]),
    ],
)
def test_plan_file(tmp_path, text, parts):
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    says(refusal(load_plan, file, kind=UsageError), file, *parts)


@pytest.mark.parametrize("source", ["../secret.txt", "/etc/passwd", "texts/../../secret.txt@2"])
def test_plan_file_may_not_reach_outside_its_folder(tmp_path, source):
    (tmp_path / "secret.txt").write_text("secret")
    file = tmp_path / "plans" / "plan.yaml"
    file.parent.mkdir()
    file.write_text(json.dumps({"steps": EVERYTHING, "calibration": {"sources": [source]}}))
    says(
        refusal(load_plan, file, kind=UsageError), source.partition("@")[0], "leaves the plan's folder", "--calibration"
    )


def test_ordering_needs_repeated_blocks():
    model = nn.Sequential(nn.Linear(16, 16))
    says(refusal(effllm.compress, model, "layerwise-4bit", kind=UsageError), "layerwise-4bit", "use a uniform plan")


WRONG = {
    (): None,
    ("nope",): "No such command 'nope'; see effllm --help",
    ("compress",): "see effllm compress --help",
    ("compress", "MODEL", "--nope"): "--nope",
    ("compress", "MODEL", "--samples", "0"): "--samples",
    ("compress", "MODEL", "--samples", "many"): "--samples",
    ("compress", "MODEL", "--plan", "unifrm-4bit"): "did you mean 'uniform-4bit'?",
    ("compress", "MODEL", "--dtype", "int8"): "--dtype int8: known: float32",
    ("compress", "MODEL", "--device", "nope"): "--device nope",
    ("compress", "MODEL", "--out", "OUT", "--calibration", "no.txt"): "no text file or folder 'no.txt'",
    ("compress", "MODEL", "--out", "OUT", "--calibration", "default@0"): "weight after @",
    ("compress", "MODEL", "--out", "OUT", "--calibration", "default@inf"): "weight after @",
    ("compress", "nothing"): "'nothing' is no folder, no alias and no hub id (owner/name)",
    ("compress", "a--/b.."): "no valid hub id",
    (
        "plan",
        "MODEL",
        "--set",
        "nope.*=quantize",
    ): "'nope.*' matches no layer of the model; its sites: model.embed_tokens",
    ("plan", "MODEL", "--set", "*=quantise"): "did you mean 'quantize'?",
    ("plan", "MODEL", "--set", "*=quantize:bits=9"): "less than or equal to 8",
    ("plan", "MODEL", "--set", "*"): "GLOB=METHOD:key=value",
    ("plan", "MODEL", "--exclude", "nope.*"): "'nope.*' matches no layer of the model; its sites: model.embed_tokens",
    ("plan", "MODEL", "--score", "lin"): "did you mean 'lim'?",
    ("plan", "MODEL", "--plan", PLAN, "--score", "zd"): "orders nothing",
    ("methods", "quantise"): "did you mean 'quantize'?",
    ("chat", "MODEL", "--temperature", "-1"): "--temperature",
}


@pytest.mark.parametrize("arguments", list(WRONG), ids=" ".join)
def test_wrong_usage(original, tmp_path, capsys, arguments):
    names = {"MODEL": original, "OUT": tmp_path / "out"}
    status, out, err = run(capsys, *(names.get(argument, argument) for argument in arguments))
    assert status == 2
    if WRONG[arguments] is None:
        assert "Usage" in out + err
        return
    assert out == ""
    assert err.startswith("effllm: ") and err.count("\n") == 1
    says(err, WRONG[arguments])
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


FAILURES = {
    "truncated": (
        lambda folder: os.truncate(folder / SINGLE, 1000),
        ["compress", "MODEL", "--out", "OUT"],
        "truncated",
    ),
    "quantised": (
        lambda folder: edit_config(folder, quantization_config={"quant_method": "gptq"}),
        ["plan", "MODEL"],
        "quantised already",
    ),
    "tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text('{"model": 5}'),
        ["compress", "MODEL", "--out", "OUT"],
        "no usable tokenizer",
    ),
    "no tokenizer": (no_tokenizer, ["compress", "MODEL", "--out", "OUT"], "no usable tokenizer"),
    "class": (lambda folder: edit_config(folder, architectures=["Nope"]), ["eval", "MODEL"], "upgrade transformers"),
    "config": (lambda folder: edit_config(folder, hidden_size="x"), ["chat", "MODEL", "--prompt", "x"], "hidden_size"),
    "output": (lambda folder: None, ["compress", "MODEL", "--out", "MODEL"], "choose another --out"),
    "no network": (lambda folder: None, ["compress", "somebody/something"], "check the network"),
    "no folder": (lambda folder: None, ["plan", "MODEL", "-o", "OUT/plan.yaml"], "No such file or directory"),
}


@pytest.mark.parametrize("case", list(FAILURES))
def test_failure(folder, tmp_path, capsys, case):
    damage, arguments, part = FAILURES[case]
    damage(folder)
    names = {"MODEL": str(folder), "OUT": str(tmp_path / "out"), "OUT/plan.yaml": str(tmp_path / "out" / "plan.yaml")}
    status, out, err = run(capsys, *(names.get(argument, argument) for argument in arguments))
    assert (status, out) == (1, "")
    assert err.startswith("effllm: ") and err.count("\n") == 1
    says(err, part)
    assert not (tmp_path / "out").exists()


def test_error_of_several_lines_takes_one(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError("no connection\nCheck the network.")

    monkeypatch.setattr(effllm, "compress_folder", fail, raising=False)
    assert run(capsys, "compress", "x") == (1, "", "effllm: no connection Check the network.\n")


def test_interrupted(monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(effllm, "compress_folder", interrupt, raising=False)
    assert run(capsys, "compress", "x") == (130, "", "effllm: interrupted; the same command resumes\n")


def test_debug_shows_where(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["effllm", "--debug", "plan", "nothing"])
    with pytest.raises(UsageError):
        cli.main()


def test_failure_in_a_process_of_its_own(folder):
    os.truncate(folder / SINGLE, 1000)
    command = [sys.executable, "-m", "effllm.cli", "compress", str(folder), "--out", str(folder.with_name("out"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("effllm: ") and done.stderr.count("\n") == 1
    says(done.stderr, folder / SINGLE, "truncated", "download it again")


def test_no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refusal(effllm.plan, "somebody/something", PLAN)
    says(message, "'somebody/something'", "cannot reach the hub", "check the network")


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("a.txt", b"\xff\xfe\xff", "cannot be read as text"),
        ("a.jsonl", b'{"text": ', "cannot be read as text"),
        ("a.jsonl", b'{"txt": "x"}', "needs 'text' or 'messages'"),
        ("a.json", b"5", "holds no JSON list"),
        ("a.json", b'{"text": "x"}', "holds no JSON list"),
        ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}', "no chat template; give plain text"),
        ("a.txt", b"", "has 0 tokens, fewer than one window of 512; give more text"),
    ],
)
def test_calibration_text(folder, tmp_path, name, content, part):
    (tmp_path / name).write_bytes(content)
    says(compress_refusal(folder, load_plan("layerwise-4bit").override(sources=[str(tmp_path / name)])), part)
    assert not (tmp_path / "out.partial").exists()
