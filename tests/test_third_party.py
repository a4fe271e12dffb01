"""Methods of another package (`third_party`), each of which tries another part of the interface."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import read_tensors, save, tiny_llama
from families import FAMILIES, inputs_of, outputs_of

import effllm
from effllm.checkpoint import Checkpoint
from effllm.data.text import load_tokenizer, token_windows
from effllm.errors import EffllmError, UsageError
from effllm.layers.placing import codec_modules
from effllm.method import Codec
from effllm.plans import load_plan
from effllm.registry import from_spec, methods
from effllm.site import find_sites

NAMES = ["float16", "linear_mlp", "low_rank", "output_norm", "residual", "separable", "skip_block", "ternary"]
CODECS = ["low_rank", "residual", "ternary"]
DATA = {"samples": 4, "sequence_length": 32}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the metadata that pip would write for the package."""
    folder = tmp_path_factory.mktemp("site-packages")
    metadata = folder / "third_party-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    classes = {name: "".join(word.title() for word in name.split("_")) for name in NAMES}
    points = "\n".join(f"{name} = third_party.{name}:{cls}" for name, cls in classes.items())
    (metadata / "entry_points.txt").write_text(f"[effllm.methods]\n{points}\n")
    return folder


@pytest.fixture(autouse=True)
def installed(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.syspath_prepend(package)
    monkeypatch.setenv("EFFLLM_CACHE", str(tmp_path / "cache"))
    methods.cache_clear()
    yield
    methods.cache_clear()


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("test_methods.py", "float16 or low_rank or residual or separable or ternary or output_norm"),
        ("test_edits.py", "skip_block"),
    ],
)
def test_they_keep_the_contract(package, file, names):
    tests = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (package, tests)))}
    command = [sys.executable, "-m", "pytest", str(tests / file), "-k", names, "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=env, cwd=tests.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 2, done.stdout


@pytest.mark.parametrize("name", CODECS)
def test_a_codec_is_chosen_by_a_budget_and_comes_back_from_the_folder(name, tmp_path):
    folder = save(tiny_llama(tied=False, initializer_range=0.1, layers=2), tmp_path / "model")
    step = {"sites": ["blocks"], "choose": [name]}
    plan = {"budget": "7bpw", "exclude": ["embeddings", "head"], "calibration": DATA, "steps": [step]}
    effllm.compress_folder(folder, tmp_path / "out", plan, check=False)
    loaded = effllm.load(tmp_path / "out")
    assert {layer.codec.name() for layer in codec_modules(loaded).values()} == {name}
    assert Checkpoint.open(tmp_path / "out").stored_bytes < Checkpoint.open(folder).stored_bytes


def test_a_codec_that_is_made_of_two_names_both():
    codec = from_spec({"residual": {"first": {"quantize": {"bits": 4}}, "second": "quantize:bits=3,group_size=32"}})
    assert codec.label() == "residual:first=quantize:bits=4,second=quantize:bits=3,group_size=32"
    assert from_spec({"residual": codec.settings()}) == codec


def test_what_a_codec_calls_trainable_is_learnt(tmp_path):
    folder = save(tiny_llama(tied=False, initializer_range=0.1, layers=2), tmp_path / "model")
    step = {"sites": ["blocks"], "use": "ternary"}
    scales = {}
    for effort in ("normal", "best"):
        plan = {"effort": effort, "calibration": {"samples": 12, "sequence_length": 32}, "steps": [step]}
        effllm.compress_folder(folder, tmp_path / effort, plan, check=False)
        scales[effort] = {k: t for k, t in read_tensors(tmp_path / effort).items() if k.endswith(".scale")}
    assert any(not torch.equal(scale, scales["best"][name]) for name, scale in scales["normal"].items())


def test_a_codec_of_convolutions_finds_their_kernels_alone():
    model = FAMILIES["resnet"]()
    torch.manual_seed(0)
    for site in find_sites(model):
        assert bool(methods()["separable"].grid(site)) == (len(site.kernel) == 2 and min(site.kernel) > 1)
    inputs = inputs_of(model)
    step = {"sites": ["*"], "choose": ["separable"]}
    images = torch.randn(8, *inputs["pixel_values"].shape[1:])
    effllm.compress(model, {"budget": "13bpw", "calibration": DATA, "steps": [step]}, calibration=images)
    kinds = {name: layer.codec.name() for name, layer in codec_modules(model).items()}
    assert {*kinds.values()} == {"separable"} and torch.isfinite(outputs_of(model, inputs)).all()


def test_a_score_orders_blocks(tmp_path):
    folder = save(tiny_llama(layers=4), tmp_path / "model")
    effllm.compress_folder(
        folder, tmp_path / "out", effllm.plan(folder, "layerwise-4bit").plan.override(score="output_norm", **DATA)
    )
    assert codec_modules(effllm.load(tmp_path / "out"))


PLAN = {
    "calibration": {"samples": 32, "sequence_length": 64},
    "steps": [{"apply": {"linear_mlp": {"steps": 5}}}, {"sites": ["blocks"], "use": "quantize:bits=8"}],
}


def test_an_edit_learns_new_weights_which_codecs_find_and_the_folder_keeps(tmp_path):
    model = tiny_llama(tied=False, initializer_range=0.05, layers=2, dtype=torch.float32)
    folder = save(model, tmp_path / "model")
    planned = effllm.plan(folder, PLAN)
    result = effllm.compress_folder(folder, tmp_path / "out", PLAN, check=False)
    assert abs(planned.stored_bytes - result.stored_bytes) < 0.02 * result.stored_bytes
    loaded = effllm.load(tmp_path / "out")
    names = set(codec_modules(loaded))
    assert {"model.layers.0.mlp", "model.layers.1.mlp"} <= names and not any("up_proj" in name for name in names)
    assert not any("up_proj" in key for key in read_tensors(tmp_path / "out"))

    windows = token_windows(load_tokenizer(folder), ["default"], 8, 64)
    wanted = model(input_ids=windows).logits
    without = tiny_llama(tied=False, initializer_range=0.05, layers=2, dtype=torch.float32)
    for block in without.model.layers:
        torch.nn.init.zeros_(block.mlp.down_proj.weight)
    fitted, dropped = ((one(input_ids=windows).logits - wanted).norm() for one in (loaded, without))
    assert fitted < dropped, "on the text that was learnt from, a matrix is nearer to the MLP than nothing"

    live = effllm.load(folder)
    effllm.compress(live, PLAN)
    live.save_pretrained(tmp_path / "live")
    again = effllm.load(tmp_path / "live")
    assert torch.equal(again(input_ids=windows).logits, live(input_ids=windows).logits)
    torch.testing.assert_close(live(input_ids=windows).logits, loaded(input_ids=windows).logits, atol=1e-3, rtol=1e-3)


def test_edits_of_a_folder_stay_where_its_weights_are_encoded_later(tmp_path):
    folder = save(tiny_llama(layers=3), tmp_path / "model")
    skip = {"steps": [{"apply": "skip_block:block=1"}]}
    effllm.compress_folder(folder, tmp_path / "skipping", skip)
    effllm.compress_folder(tmp_path / "skipping", tmp_path / "out", "uniform-8bit")
    effllm.compress_folder(folder, tmp_path / "plain", "uniform-8bit")
    loaded, plain = effllm.load(tmp_path / "out"), effllm.load(tmp_path / "plain")
    tokens = torch.tensor([[1, 2, 3]])
    assert codec_modules(loaded) and not torch.equal(loaded(input_ids=tokens).logits, plain(input_ids=tokens).logits)
    effllm.apply(plain, "skip_block:block=1")
    assert torch.equal(loaded(input_ids=tokens).logits, plain(input_ids=tokens).logits)


def test_a_budget_is_spent_on_the_edited_model(tmp_path):
    folder = save(tiny_llama(tied=False, initializer_range=0.05, layers=2), tmp_path / "model")
    steps = [PLAN["steps"][0], {"sites": ["blocks"], "choose": ["quantize"]}]
    plan = {**PLAN, "budget": "4bpw", "exclude": ["embeddings", "head"], "steps": steps}
    planned = effllm.plan(folder, plan)
    assert planned.predicted_kl and any(row.name == "model.layers.0" for row in planned.rows)
    result = effllm.compress_folder(folder, tmp_path / "out", plan, check=False)
    assert result.bits_per_weight <= 4 and "model.layers.0.mlp" in codec_modules(effllm.load(tmp_path / "out"))


@pytest.mark.parametrize("name", ["float16", "ternary"])
def test_a_tied_embedding_comes_back_whatever_is_stored_of_it(tmp_path, name):
    folder = save(tiny_llama(layers=1), tmp_path / "model")
    plan = {"steps": [{"sites": ["*"], "use": name}]}
    live = effllm.compress(effllm.load(folder), plan)
    tokens = torch.tensor([[1, 2, 3]])
    live.save_pretrained(tmp_path / "live")
    effllm.compress_folder(folder, tmp_path / "out", plan)
    for out in ("live", "out"):
        loaded = effllm.load(tmp_path / out)
        assert torch.equal(loaded(input_ids=tokens).logits, live(input_ids=tokens).logits)
        head, table = loaded.lm_head.stored(), loaded.model.embed_tokens.stored()
        assert all(head[key].data_ptr() == table[key].data_ptr() for key in table), "one tensor for both"


def test_an_edit_goes_on_by_its_name():
    model = tiny_llama(layers=2)
    tokens = torch.tensor([[1, 2, 3]])
    before = model(input_ids=tokens).logits
    with effllm.apply(model, "skip_block:block=1"):
        assert not torch.equal(model(input_ids=tokens).logits, before)
    assert torch.equal(model(input_ids=tokens).logits, before)
    with pytest.raises(UsageError, match="lim is no edit: it is a score, for a step's 'order', or --score METHOD"):
        effllm.apply(model, "lim")
    with pytest.raises(UsageError, match="skip_block is no codec: it is an edit, for a step of its own"):
        load_plan("uniform-8bit").override(["*.up_proj=skip_block"])


def test_a_plan_is_refused_before_the_work_where_its_edits_cannot_act(tmp_path):
    folder = save(tiny_llama(layers=2), tmp_path / "model")
    for edits in ([{"apply": "skip_block:block=9"}], [{"apply": "skip_block:block=9"}, PLAN["steps"][0]]):
        with pytest.raises(UsageError, match="the model has 2 blocks; give a smaller number"):
            effllm.plan(folder, {"steps": [*edits, PLAN["steps"][1]]})


def test_a_score_that_cannot_tell_is_refused(tmp_path):
    folder = save(tiny_llama(layers=4), tmp_path / "model")
    plan = load_plan("layerwise-4bit").override(score="output_norm:power=nan", **DATA)
    with pytest.raises(UsageError, match=r"output_norm:power=nan gives NaN as the importance of model\.layers\.0"):
        effllm.compress_folder(folder, tmp_path / "out", plan)


def test_a_package_that_cannot_be_imported_is_left_out(package, tmp_path, monkeypatch, caplog):
    metadata = tmp_path / "broken-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[effllm.methods]\ngone = broken.gone:Gone\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert "gone" not in methods() and "ternary" in methods()
    assert "method gone of the package broken cannot be imported" in caplog.text


def test_a_codec_whose_shapes_depend_on_values_is_named():
    class Depends(Codec):
        def encode(self, weight, moments=None):
            return {"values": weight[: int(weight.abs().max())]}

        def decode(self, data, shape):
            return data["values"]

    with pytest.raises(EffllmError, match=r"does not tell what it stores of a weight \[4, 8\]: encode must return"):
        Depends().layout((4, 8))


def test_an_edit_of_the_structure_that_cannot_be_kept_is_refused(tmp_path):
    folder = save(tiny_llama(layers=2), tmp_path / "model")
    with pytest.raises(UsageError, match="add a step with a codec"):
        effllm.compress_folder(folder, tmp_path / "out", {**PLAN, "steps": PLAN["steps"][:1]})
    with pytest.raises(UsageError, match="while loading"):
        type(tiny_llama()).from_pretrained(folder, quantization_config=effllm.Config(plan=PLAN))
