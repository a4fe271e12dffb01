"""`effllm diff`: exactly the layers to which two plans give different things."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import save, tiny_llama
from safetensors import safe_open

import effllm
from effllm import cli
from effllm.errors import UsageError
from effllm.methods.quantize import Quantize
from effllm.plans import load_plan
from effllm.report.diff import diff

DATA = {"samples": 4, "sequence_length": 32}
CHANGED = [f"model.layers.{layer}.mlp.down_proj" for layer in range(3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tiny_llama(initializer_range=0.1), tmp_path_factory.mktemp("diff") / "llama")


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["effllm", "diff", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def budgeted(budget: str):
    choose = [f"quantize:bits={bits},group_size=64" for bits in (2, 3, 4, 6)]
    return load_plan({"budget": budget, "calibration": DATA, "steps": [{"sites": ["*"], "choose": choose}]})


def test_only_what_differs_is_listed_in_model_order(folder):
    one = load_plan("uniform-4bit")
    other = one.override(["*.down_proj=quantize:bits=6,group_size=32"])
    found = diff(one, other, folder)
    assert [row.site for row in found] == CHANGED
    for row in found:
        assert row.other.label == Quantize(bits=6, group_size=32).label()
        assert row.other.bits == pytest.approx(6 + 22 / 32) and row.other.nbytes > row.one.nbytes
        assert row.other.nbytes == Quantize(bits=6, group_size=32).stored_bytes((256, 384))
        assert row.one.loss is None and row.other.loss is None


def test_a_layer_that_one_plan_leaves_alone_is_unchanged(folder):
    one = load_plan("uniform-4bit")
    found = diff(one, one.override((), ["model.layers.1.self_attn.q_proj"]), folder)
    (row,) = found
    assert row.site == "model.layers.1.self_attn.q_proj"
    assert (row.other.label, row.other.bits, row.other.nbytes, row.other.loss) == ("unchanged", 16.0, 2 * 256 * 256, 0)


def test_the_bytes_are_those_that_the_folders_differ_by(folder, tmp_path):
    plans = [load_plan("uniform-4bit"), load_plan("uniform-4bit").override(["*.down_proj=quantize:bits=6"])]
    sizes = []
    for number, plan in enumerate(plans):
        effllm.compress_folder(folder, tmp_path / str(number), plan, check=False)
        total = 0
        for file in (tmp_path / str(number)).glob("*.safetensors"):
            with safe_open(file, "pt") as handle:
                total += sum(handle.get_tensor(key).nbytes for key in handle.keys())  # noqa: SIM118
        sizes.append(total)
    assert sum(row.other.nbytes - row.one.nbytes for row in diff(*plans, folder)) == sizes[1] - sizes[0]


def test_budgets_are_solved_first_and_losses_come_with_them(folder):
    one, other = budgeted("3.25bpw"), budgeted("4.25bpw")
    found = diff(one, other, folder)
    assert found and all(side.loss is not None for row in found for side in (row.one, row.other))
    change = sum(row.other.loss - row.one.loss for row in found)
    losses = [effllm.plan(folder, plan).predicted_kl for plan in (one, other)]
    assert change == pytest.approx(losses[1] - losses[0], rel=1e-6) and change < 0
    back = diff(other, one, folder)
    assert [(row.site, row.other, row.one) for row in back] == [(row.site, row.one, row.other) for row in found]
    assert diff(one, one, folder) == []


def test_the_command_says_how_many_layers_differ_and_when_none_does(run, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = load_plan("uniform-4bit").override(["*.down_proj=quantize:bits=6"])
    (tmp_path / "mine.yaml").write_text(plan.to_yaml())
    status, out, _ = run("uniform-4bit", "mine.yaml", "--model", folder)
    assert status == 0 and "3 layers differ: +" in out
    status, out, _ = run("mine.yaml", "mine.yaml", "--model", folder)
    assert status == 0 and "give every layer the same" in " ".join(out.split())


def test_what_is_done_differently_to_the_same_codecs_is_said(run, folder, tmp_path):
    solved = load_plan("uniform-4bit").override(spending={"effort": "normal"})
    (tmp_path / "solved.yaml").write_text(solved.to_yaml())
    status, out, _ = run("uniform-4bit", tmp_path / "solved.yaml", "--model", folder)
    assert status == 0 and "effort: fast -> normal" in out and "inputs" not in out


def test_json_is_one_list_of_differences(run, folder):
    status, out, _ = run("uniform-4bit", "uniform-8bit", "--model", folder, "--json")
    rows = json.loads(out)
    assert status == 0 and rows[0].keys() == {"site", "one", "other"}
    assert all(row["one"].keys() == {"label", "bits", "nbytes", "loss"} for row in rows)
    assert all(row["one"]["nbytes"] < row["other"]["nbytes"] for row in rows)
    assert json.loads(run("uniform-4bit", "uniform-4bit", "--model", folder, "--json")[1]) == []


def test_plans_that_order_blocks_cannot_be_compared(run, folder):
    with pytest.raises(UsageError, match="orders blocks"):
        diff("layerwise-4bit", "uniform-4bit", folder)
    status, out, err = run("uniform-4bit", "layerwise-4bit", "--model", folder)
    assert status == 2 and not out and "orders blocks" in err


def test_a_plan_that_matches_nothing_is_refused(folder):
    wrong = {"steps": [{"sites": ["*.nothing"], "use": "quantize"}]}
    with pytest.raises(UsageError, match="matches no layer"):
        diff("uniform-4bit", load_plan(wrong), folder)
