"""The contract that every registered method keeps, other packages' methods included. A new method needs no new test."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from conftest import read_tensors, save, tiny_gpt2, tiny_llama
from families import FAMILIES, inputs_of, outputs_of

import effllm
from effllm.method import Codec, Score
from effllm.moments import Metric, Moments
from effllm.registry import from_spec, methods
from effllm.site import find_sites
from effllm.source import LiveModel

CODECS = [name for name, cls in methods().items() if issubclass(cls, Codec)]
SCORES = [name for name, cls in methods().items() if issubclass(cls, Score)]
MODELS = {
    "llama": tiny_llama,
    "untied": lambda: tiny_llama(tied=False),
    "gpt2": tiny_gpt2,
    "resnet": FAMILIES["resnet"],
}


@pytest.fixture(autouse=True)
def needs_its_packages(request):
    """Skips a method whose optional packages are not installed."""
    requires = methods()[request.getfixturevalue("name")].requires if "name" in request.fixturenames else ()
    for module in requires:
        pytest.importorskip(module, reason=f"needs pip install 'effllm[{module}]'")


def options(name: str, site) -> list[Codec]:
    return methods()[name].grid(site)


def one_plan(name: str, model) -> dict:
    """The last option that fits every site of the model's blocks to which the codec applies."""
    grids = {site.name: options(name, site) for site in find_sites(model) if site.role == "block"}
    sites = [site for site, grid in grids.items() if grid]
    if not sites:
        pytest.skip("it applies to none of these weights")
    option = next(one for one in reversed(grids[sites[0]]) if all(one in grids[site] for site in sites))
    return {"steps": [{"sites": sites, "use": option}]}


def host(name: str):
    """A model, and one of its sites, to which a codec applies."""
    for build in MODELS.values():
        model = build()
        site = next((site for site in find_sites(model) if site.role == "block" and options(name, site)), None)
        if site is not None:
            return model, site
    raise AssertionError(f"{name} applies to no weight of {', '.join(MODELS)}")


@pytest.mark.parametrize("name", list(methods()))
def test_documented(name):
    cls = methods()[name]
    assert cls.__doc__ and len(cls.__doc__.strip().splitlines()[0]) > 20, "the docstring is the documentation"
    assert cls.paper, "say where the idea comes from, or 'control'"
    assert cls.name() == name


@pytest.mark.parametrize("name", list(methods()))
def test_settings_round_trip(name):
    candidates = options(name, host(name)[1]) if name in CODECS else [methods()[name]()]
    for method in candidates:
        assert from_spec({name: method.settings()}) == method
        assert hash(from_spec({name: method.settings()})) == hash(method)
    labels = [method.label() for method in candidates]
    assert len(set(labels)) == len(labels), "prices are kept by label"


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("model", list(MODELS))
def test_applies_and_beats_zero(name, model):
    built = MODELS[model]()
    seen = set()
    for site in find_sites(built):
        if site.shape in seen:
            continue
        seen.add(site.shape)
        weight = site.matrix(built).float()
        for codec in options(name, site):
            data = codec.encode(weight)
            decoded = codec.decode(data, site.shape)
            assert decoded.shape == weight.shape and decoded.is_floating_point()
            assert torch.isfinite(decoded).all()
            assert (decoded - weight).norm() < weight.norm(), f"{codec.label()} on {site.name} is no better than zero"
            layout = {key: (tuple(tensor.shape), tensor.dtype) for key, tensor in data.items()}
            assert layout == codec.layout(site.shape), "encode on the meta device must give the stored shapes"
            assert codec.stored_bytes(site.shape) == sum(tensor.nbytes for tensor in data.values())
            assert "weight" not in data, "no stored tensor may be called weight"


@pytest.mark.parametrize("name", CODECS)
def test_rows_and_products_agree_with_decode(name):
    model, site = host(name)
    weight = site.matrix(model).float()
    x = torch.randn(5, site.shape[1], generator=torch.Generator().manual_seed(1))
    for codec in options(name, site):
        data = codec.encode(weight)
        decoded = codec.decode(data, site.shape)
        index = torch.tensor([3, 0, 3, site.shape[0] - 1])
        if codec.by_rows:
            some = torch.arange(0, len(weight), 4)
            alone = codec.decode(codec.encode(weight[some]), (len(some), site.shape[1]))
            of_some, of_all = ((one - weight[some]).norm() for one in (alone, decoded[some]))
            assert abs(of_some - of_all) <= 0.02 * of_all, f"{codec.label()}: rows hang together: say by_rows = False"
        assert torch.equal(codec.decode_rows(data, index, site.shape), decoded[index])
        torch.testing.assert_close(codec.linear(x, data, site.shape), x @ decoded.float().t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CODECS)
def test_what_solves_a_metric_keeps_the_layout_and_gains_by_refining(name):
    model, site = host(name)
    weight = site.matrix(model).float()
    x = torch.randn(300, site.shape[1]) @ torch.randn(site.shape[1], site.shape[1])
    found = Moments(Metric((x.t() @ x / 300)[None], site.shape[1]), torch.ones(site.shape[0]))
    for codec in options(name, site):
        data = codec.encode(weight, found)
        refined = codec.refine(data, weight, found)
        for stored in (data, refined):
            assert {key: (tuple(t.shape), t.dtype) for key, t in stored.items()} == codec.layout(site.shape)
        costs = [found.costs(codec.decode(stored, site.shape) - weight).sum() for stored in (data, refined)]
        assert costs[1] <= 1.01 * costs[0], codec.label()


@pytest.mark.parametrize("name", CODECS)
def test_what_is_trainable_takes_gradients(name):
    model, site = host(name)
    codec = options(name, site)[0]
    data = codec.encode(site.matrix(model).float())
    for key in codec.trainable:
        assert data[key].is_floating_point()
        trained = data[key].float().requires_grad_()
        codec.decode({**data, key: trained}, site.shape).square().sum().backward()
        assert trained.grad is not None and trained.grad.abs().sum() > 0


def flat(settings: dict, place: str = "") -> dict:
    """Settings with those of inner codecs beside them."""
    found = {}
    for key, value in settings.items():
        found |= flat(value, f"{place}{key}.") if isinstance(value, dict) else {place + key: value}
    return found


@pytest.mark.parametrize("name", CODECS)
def test_more_bytes_never_lose(name):
    """Options that differ in one ordered field: the larger is no worse by more than 5 %."""
    model, site = host(name)
    weight = site.matrix(model).float()
    measured = []
    for option in options(name, site):
        error = (option.decode(option.encode(weight), site.shape) - weight).norm()
        measured.append((flat(option.settings()), option.stored_bytes(site.shape), float(error)))
    compared = len({nbytes for _, nbytes, _ in measured}) == 1
    for one, one_bytes, one_error in measured:
        for other, other_bytes, other_error in measured:
            differing = [key for key in one if one[key] != other[key]]
            if len(differing) == 1 and isinstance(one[differing[0]], (int, float)) and one_bytes > other_bytes:
                assert one_error <= 1.05 * other_error, f"{one} is larger than {other} and worse"
                compared = True
    assert compared


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("model", list(MODELS))
def test_saved_model_equals_live_model(name, model, tmp_path):
    built = MODELS[model]()
    effllm.compress(built, one_plan(name, built))
    inputs = inputs_of(built)
    expected = outputs_of(built, inputs)
    built.save_pretrained(tmp_path / "out")
    assert torch.equal(outputs_of(type(built).from_pretrained(tmp_path / "out"), inputs), expected)
    assert torch.equal(outputs_of(effllm.load(tmp_path / "out"), inputs), expected)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("model", list(MODELS))
def test_folder_route_writes_the_live_tensors(name, model, tmp_path):
    built = MODELS[model]()
    source = save(built, tmp_path / "source")
    plan = one_plan(name, built)
    result = effllm.compress_folder(source, tmp_path / "folder", plan)
    live = type(built).from_pretrained(source)
    effllm.compress(live, plan)
    live.save_pretrained(tmp_path / "live")
    one, other = read_tensors(tmp_path / "folder"), read_tensors(tmp_path / "live")
    assert one.keys() == other.keys()
    assert all(one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one)
    on_disk = sum(file.stat().st_size for file in (tmp_path / "folder").glob("*.safetensors"))
    assert result.stored_bytes == on_disk


@pytest.mark.parametrize("name", SCORES)
def test_scores_order_all_blocks(name, tokens):
    source = LiveModel(tiny_llama())
    score = methods()[name]()
    batches = [{"input_ids": tokens}] if score.needs_data else []
    found = score.score(source, batches)
    assert set(found) == set(source.blocks)
    assert len(set(found.values())) > 1, "a score must tell blocks apart"
    assert score.score(source, batches) == found, "the same data gives the same score"


def test_optional_dependencies_are_imported_on_use():
    code = (
        "import sys, effllm; effllm.methods(); "
        "print([m for m in ('datasets', 'peft', 'bitsandbytes', 'tensorly', 'matplotlib', 'gguf') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
