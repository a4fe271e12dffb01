"""The contract of every codec over every family of models: save, load and stream, with equal tensors and outputs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_tensors
from families import FAMILIES, inputs_of, outputs_of
from pages import ROOT
from torch import nn
from transformers import PreTrainedModel

import effllm
from effllm.layers import CodecModule
from effllm.method import Codec
from effllm.registry import methods
from effllm.site import find_blocks, find_sites, unchanged

CODECS = [name for name, cls in methods().items() if issubclass(cls, Codec)]
SAVED = [name for name in FAMILIES if name != "plain module"]
QUICK = ["llama", "gpt2", "mixtral", "gpt_oss", "resnet", "mobilenet_v2", "whisper", "mamba", "gemma3n"]
CASES = [
    pytest.param(codec, family, marks=[] if codec == "quantize" or family in QUICK else [pytest.mark.slow])
    for codec in CODECS
    for family in SAVED
]
Case = tuple[Path, nn.Module, torch.Tensor]


def plan_for(codec: str, model: nn.Module) -> dict[str, Any]:
    """Every site gets the option of its own grid that is listed last."""
    grids = {site.name: methods()[codec].grid(site) for site in find_sites(model)}
    return {"steps": [{"sites": [name], "use": grid[-1]} for name, grid in grids.items() if grid]}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Case]:
    """(codec, family) -> a folder with the model as `original` and, compressed live, as `live`; the model; its output."""
    made: dict[tuple[str, str], Case] = {}

    def make(codec: str, family: str) -> Case:
        if (codec, family) not in made:
            folder = tmp_path_factory.mktemp("case")
            model = FAMILIES[family]()
            model.save_pretrained(folder / "original")
            model = type(model).from_pretrained(folder / "original")
            effllm.compress(model, plan_for(codec, model))
            model.save_pretrained(folder / "live")
            made[codec, family] = folder, model, outputs_of(model, inputs_of(model))
        return made[codec, family]

    return make


@pytest.mark.parametrize(("codec", "family"), CASES)
def test_a_loaded_model_computes_what_the_live_one_did(codec, family, case):
    folder, _, expected = case(codec, family)
    loaded = effllm.load(folder / "live")
    assert torch.equal(outputs_of(loaded, inputs_of(loaded)), expected)
    assert torch.isfinite(expected).all()
    loaded.save_pretrained(folder / "again")
    live, again = read_tensors(folder / "live"), read_tensors(folder / "again")
    assert live.keys() == again.keys() and all(torch.equal(live[key], again[key]) for key in live)


@pytest.mark.parametrize(("codec", "family"), CASES)
def test_the_streamed_folder_holds_the_tensors_of_the_live_model(codec, family, case):
    folder, model, _ = case(codec, family)
    plan = plan_for(codec, type(model).from_pretrained(folder / "original"))
    result = effllm.compress_folder(folder / "original", folder / "streamed", plan)
    live, streamed = read_tensors(folder / "live"), read_tensors(folder / "streamed")
    assert live.keys() == streamed.keys()
    assert all(live[key].dtype == streamed[key].dtype and torch.equal(live[key], streamed[key]) for key in live)
    assert result.stored_bytes == sum(file.stat().st_size for file in (folder / "streamed").glob("*.safetensors"))
    small = (folder / "streamed" / "config.json").stat().st_size
    assert small < 40_000 + 2 * (folder / "original" / "config.json").stat().st_size


@pytest.mark.parametrize("family", FAMILIES)
def test_every_large_weight_is_a_site_or_named(family):
    model = FAMILIES[family]()
    sites = find_sites(model)
    left = unchanged(model, sites, {site.name for site in sites})
    assert all("MultiheadAttention" in why for _, _, why in left), left
    assert sum(share for _, share, _ in left) < 0.1


def test_the_output_of_a_fresh_process_is_bit_equal(case, tmp_path):
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import torch, effllm
from families import inputs_of, outputs_of
for line in open({str(tmp_path / "cases")!r}):
    model = effllm.load(line.strip())
    torch.save(outputs_of(model, inputs_of(model)), line.strip() + ".pt")
"""
    cases = {family: case("quantize", family) for family in SAVED}
    (tmp_path / "cases").write_text("\n".join(str(folder / "live") for folder, _, _ in cases.values()))
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    differing = [
        family for family, (folder, _, out) in cases.items()
        if not torch.equal(torch.load(folder / "live.pt", weights_only=True), out)
    ]  # fmt: skip
    assert not differing


def test_the_documentation_names_every_family():
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert not [family for family in FAMILIES if f"`{family}`" not in page]


def test_a_plain_module_is_compressed_in_place(tmp_path):
    model = FAMILIES["plain module"]()
    inputs = inputs_of(model)
    plain = outputs_of(model, inputs)
    effllm.compress(model, "uniform-8bit")
    assert all(isinstance(m, CodecModule) for n, m in model.named_children() if n != "norm")
    assert model.again.codes is model.mix.codes, "one module under two names stays one weight"
    torch.testing.assert_close(outputs_of(model, inputs), plain, atol=0.02, rtol=0.05)


def test_blocks_are_found_inside_the_stages_of_a_pyramid():
    assert find_blocks(FAMILIES["resnet"]())[:3] == [
        "resnet.encoder.stages.0.layers.0", "resnet.encoder.stages.0.layers.1", "resnet.encoder.stages.1.layers.0"
    ]  # fmt: skip
    assert {block.rpartition(".")[0] for block in find_blocks(FAMILIES["whisper"]())} == {
        "model.encoder.layers", "model.decoder.layers"
    }  # fmt: skip


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_of_one_layer_may_differ(family, tmp_path):
    model = FAMILIES[family]()
    plan = {
        "exclude": ["*.gate_up_proj.1"],
        "steps": [
            {"sites": ["*.experts.*"], "use": "quantize:bits=4,group_size=32"},
            {"sites": ["*.gate_up_proj.2"], "use": "quantize:bits=8,group_size=32"},
        ],
    }
    model.save_pretrained(tmp_path / "original")
    effllm.compress(model, plan)
    weights = model.model.layers[0].mlp.experts.gate_up_proj
    assert [type(weights[e]) for e in range(4)] == [torch.Tensor] * 4
    inputs = inputs_of(model)
    expected = outputs_of(model, inputs)
    effllm.compress_folder(tmp_path / "original", tmp_path / "out", plan)
    loaded = effllm.load(tmp_path / "out")
    assert torch.equal(outputs_of(loaded, inputs), expected)
    names = [key for key in read_tensors(tmp_path / "out") if "layers.0" in key and "gate_up_proj" in key]
    assert len([key for key in names if key.endswith("codes")]) == 2 and any(key.endswith("1.dense") for key in names)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_folder_with_packed_experts_alone_is_refused_without_effllm(family, tmp_path):
    model: PreTrainedModel = FAMILIES[family]()
    effllm.compress(model, {"steps": [{"sites": ["*.experts.*"], "use": "quantize"}]})
    model.save_pretrained(tmp_path / "out")
    code = f"import transformers; transformers.{type(model).__name__}.from_pretrained({str(tmp_path / 'out')!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "Error" in done.stderr
    loaded = effllm.load(tmp_path / "out")
    assert torch.equal(outputs_of(loaded, inputs_of(loaded)), outputs_of(model, inputs_of(model)))
