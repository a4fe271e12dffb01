"""The command line's contract: what goes to stdout, exit statuses, help that teaches."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from effllm import cli
from effllm.measure.result import Result
from effllm.plans import load_plan
from effllm.registry import methods


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["effllm", *arguments])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.mark.parametrize("command", ["compress", "plan", "eval", "methods", "chat"])
def test_help_teaches(run, command):
    status, out, _ = run(command, "--help")
    assert status == 0 and "Usage" in out and len(out.splitlines()) > 8


def test_compress_prints_one_json_document(run, llama_folder):
    status, out, _ = run("compress", str(llama_folder), "--plan", "uniform-4bit", "--json")
    result = Result.model_validate_json(out)
    assert status == 0 and result.command == "compress" and result.plan["name"] == "uniform-4bit"


def test_compress_names_its_output_after_model_and_plan(run, llama_folder, tmp_path):
    status, out, _ = run("compress", str(llama_folder), "--plan", "uniform-8bit")
    assert status == 0 and (tmp_path / f"{llama_folder.name}-uniform-8bit" / "config.json").is_file()
    assert "bits per weight" in out
    status, out, _ = run("compress", str(llama_folder), "--plan", "uniform-8bit")
    assert status == 0 and "already done" in out


def test_plan_predicts_what_compress_stores(run, llama_folder):
    for preset in ("uniform-4bit", "layerwise-4bit"):
        arguments = [str(llama_folder), "--plan", preset, "--set", "*.down_proj=quantize:bits=6", "--json"]
        arguments += ["--score", "zd"] if preset == "layerwise-4bit" else []
        planned = json.loads(run("plan", *arguments)[1])
        stored = Result.model_validate_json(run("compress", *arguments)[1])
        assert abs(planned["stored_bytes"] - stored.stored_bytes) < 0.03 * stored.stored_bytes
        assert planned["bits_per_weight"] == pytest.approx(stored.bits_per_weight, rel=1e-6)


def test_plan_writes_a_plan_that_replays(run, llama_folder, tmp_path):
    arguments = ["--plan", "layerwise-3bit", "--score", "zd", "--exclude", "*.layers.0.*"]
    status, out, _ = run("plan", str(llama_folder), *arguments, "-o", "plan.yaml")
    assert status == 0 and "model.layers.0" in out
    one = Result.model_validate_json(run("compress", str(llama_folder), *arguments, "--out", "one", "--json")[1])
    two = Result.model_validate_json(
        run("compress", str(llama_folder), "--plan", "plan.yaml", "--out", "two", "--json")[1]
    )
    assert one.model_digest == two.model_digest


def test_plan_of_an_alias_needs_no_network(run):
    status, out, _ = run("plan", "llama-7b", "--plan", "layerwise-4bit", "--json")
    planned = json.loads(out)
    assert status == 0 and 13e9 < planned["original_bytes"] < 14e9
    assert planned["memory"]["kv"] == 2 * 32 * 4096 * 4096 * 2
    assert len([row for row in planned["rows"] if row["name"].startswith("model.layers.")]) == 32


def test_methods_lists_methods_and_presets(run):
    status, out, _ = run("methods", "--json")
    found = json.loads(out)
    assert status == 0 and "quantize" in found["methods"] and "layerwise-4bit" in found["presets"]
    assert "arXiv 2406.17415" in run("methods", "lim")[1]
    assert {entry["kind"] for entry in found["methods"].values()} == {"codec", "edit", "score"}
    for name, cls in methods().items():
        told = run("methods", name)[1]
        assert all(setting in told for setting in cls.model_fields), "every setting is told"
    assert load_plan("layerwise-4bit").description.split(".")[0][:20] in run("methods", "layerwise-4bit")[1]


def test_chat_answers_a_prompt(run, llama_folder):
    status, out, err = run("chat", str(llama_folder), "--prompt", "Once", "--tokens", "4")
    assert status == 0 and "tokens/s" in err and "tokens/s" not in out


def test_wrong_usage_exits_with_2(run, llama_folder):
    for arguments in (
        ("compress", "nowhere"),
        ("plan", str(llama_folder), "--plan", "layerwise-4bits"),
        ("frobnicate",),
    ):
        status, _, err = run(*arguments)
        assert status == 2 and err


def test_help_does_not_import_torch():
    code = "import sys, effllm.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_max_memory_refuses_before_any_work(run, llama_folder, tmp_path):
    status, _, err = run("compress", str(llama_folder), "--max-memory", "100kB", "--out", "out")
    assert status == 1 and "--max-memory" in err and "--samples" in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
    assert run("compress", str(llama_folder), "--max-memory", "lots")[0] == 2


def test_changed_calibration_text_is_another_run(run, llama_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Call me Ishmael. " * 60)
    arguments = [
        "compress",
        str(llama_folder),
        "--calibration",
        "text.txt",
        "--samples",
        "2",
        "--sequence-length",
        "32",
    ]
    arguments += ["--no-check", "--out", "out"]
    assert run(*arguments)[0] == 0 and "already done" in run(*arguments)[1]
    text.write_text("It was the best of times. " * 60)
    status, _, err = run(*arguments)
    assert status == 1 and "--overwrite" in err
