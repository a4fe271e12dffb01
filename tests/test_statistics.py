"""The sweep over calibration data: its moments are those of an ordinary backward, for any kind of model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import save, tiny_llama
from families import FAMILIES, inputs_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from effllm.checkpoint import Checkpoint
from effllm.errors import EffllmError, UsageError
from effllm.moments import Metric, Moments
from effllm.site import Site
from effllm.source import LiveModel, StoredModel
from effllm.statistics import DRAWS, Sums, Sweep, Tap, moments, share_experts, tap
from effllm.statistics.sums import state_of

PRICED = [name for name in FAMILIES if name not in ("siglip", "clip")]


def sharp_llama(**changes: Any) -> nn.Module:
    """A Llama whose predictions depend on its layers: the usual initial weights are so small that they hardly do."""
    return tiny_llama(dtype=torch.float32, initializer_range=0.1, **changes)


def tokens_of(count: int = 2, length: int = 24) -> Tensor:
    return torch.randint(1, 257, (count, length), generator=torch.Generator().manual_seed(0))


def swept(sweep: Sweep, done: Sequence[str] = ()) -> dict[str, list[Sums]]:
    """Site -> the sums of its uses, all gates together."""
    return {name: uses for _, sums in sweep.run(done) for name, uses in sums.items()}


def moments_of(model: nn.Module, batches: list[dict[str, Tensor]], folder: Path) -> dict[str, Moments]:
    sweep = Sweep(LiveModel(model, torch.float32), batches, folder)
    found = {name: moments(uses, sweep.tokens * DRAWS) for name, uses in swept(sweep).items()}
    return {name: one for name, one in found.items() if one is not None}


@pytest.mark.parametrize("name", PRICED)
def test_every_family_has_moments_and_stays_as_it_was(name, tmp_path):
    model = FAMILIES[name]().train()
    before = {key: (tensor, tensor.clone()) for key, tensor in model.state_dict().items()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in inputs_of(model).items()}
    found = moments_of(model, [inputs], tmp_path)
    assert len(found) > 1
    for one in found.values():
        assert torch.isfinite(one.metric.A).all() and (one.rows >= 0).all()
    assert model.training and [parameter.requires_grad for parameter in model.parameters()] == trained
    for module in model.modules():
        assert "forward" not in module.__dict__
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == before[key][0].dtype and torch.equal(tensor, before[key][1])


@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_a_model_without_logits_is_refused_in_words(name, tmp_path):
    model = FAMILIES[name]()
    inputs = {key: value.float() if value.is_floating_point() else value for key, value in inputs_of(model).items()}
    with pytest.raises(UsageError, match="no logits"):
        swept(Sweep(LiveModel(model, torch.float32), [inputs], tmp_path))


def reference(model: nn.Module, batch: dict[str, Tensor], site: Site, number: int) -> tuple[Tensor, Tensor]:
    """A and row energies, not divided, from one forward of the whole model and the sweep's own labels."""
    module = model.get_submodule(site.name)
    inputs: list[Tensor] = []
    grads: list[Tensor] = []
    embedding = model.get_input_embeddings()
    first = embedding.register_forward_hook(lambda m, i, out: out.detach().requires_grad_())

    def listen(m: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        inputs.append(given[0].detach())
        out.register_hook(grads.append)

    second = module.register_forward_hook(listen)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    logits = model(**batch, use_cache=False).logits
    drawing = Sweep.__new__(Sweep)
    drawing.seed, drawing.tokens = 0, 0
    mask = torch.ones(logits.shape[:-1], dtype=torch.bool).flatten()
    for label in drawing._labels(logits, mask, number, 0):
        torch.autograd.backward(logits, label, retain_graph=True)
    first.remove()
    second.remove()
    x = inputs[0].flatten(0, -2)
    energies = sum(g.flatten(0, -2).square().sum(1) for g in grads)
    return (x * energies[:, None]).T @ x, sum(g.flatten(0, -2).square().sum(0) for g in grads)


@pytest.mark.parametrize("tied", [True, False])
def test_moments_are_those_of_a_whole_backward(tied, tmp_path):
    model = sharp_llama(tied=tied)
    batches = [{"input_ids": part} for part in tokens_of(4).split(2)]
    sweep = Sweep(LiveModel(model), batches, tmp_path)
    sums = swept(sweep)
    for site in LiveModel(model).sites:
        if site.role == "embedding":
            continue
        pairs = [reference(model, batch, site, number) for number, batch in enumerate(batches)]
        A, rows = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
        (use,) = sums[site.name]
        assert torch.allclose(use.A[0], A, rtol=1e-3, atol=1e-5 * float(A.abs().max())), site.name
        assert torch.allclose(use.rows, rows, rtol=1e-3, atol=1e-5 * float(rows.max())), site.name


@pytest.mark.parametrize("name", ["llama", "llama, untied", "gpt2"])
def test_the_price_of_a_small_error_is_its_kl(name, tmp_path):
    torch.manual_seed(0)
    model = FAMILIES[name]().float()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(5)
    ids = tokens_of(8, 32)
    found = moments_of(model, [{"input_ids": ids}], tmp_path)
    with torch.no_grad():
        own = model(ids).logits.log_softmax(-1)
    ratios = []
    for site in LiveModel(model).sites:
        weight = site.matrix(model).clone()
        error = 0.03 * weight.std() * torch.randn_like(weight)
        owner, _, leaf = site.parameter.rpartition(".")
        parameter = getattr(model.get_submodule(owner), leaf)
        site.write(weight + error, parameter.data, model)
        with torch.no_grad():
            other = model(ids).logits.log_softmax(-1)
        site.write(weight, parameter.data, model)
        ratios.append(float(found[site.name].costs(error).sum() / (own.exp() * (own - other)).sum(-1).mean()))
    logs = torch.tensor(ratios).log()
    assert 0.4 < float(logs.median().exp()) < 1.6, ratios
    assert float(logs.std()) < 0.8, ratios


def assert_same(one: dict[str, list[Sums]], other: dict[str, list[Sums]]) -> None:
    assert one.keys() == other.keys()
    for name, uses in one.items():
        kept, again = state_of(uses, whole=True), state_of(other[name], whole=True)
        assert kept.keys() == again.keys() and all(torch.equal(kept[key], again[key]) for key in kept), name


def test_a_stored_model_gives_the_moments_of_a_live_one(tmp_path):
    model = tiny_llama(initializer_range=0.1)
    folder = save(model, tmp_path / "model")
    batches = [{"input_ids": tokens_of()}]
    live = swept(Sweep(LiveModel(model, torch.float32), batches, tmp_path / "a"))
    stored = swept(Sweep(StoredModel(Checkpoint.open(folder), torch.float32), batches, tmp_path / "b"))
    assert_same(live, stored)


@pytest.mark.parametrize("tied", [True, False])
def test_a_killed_sweep_goes_on_with_the_same_sums(tied, tmp_path):
    model = sharp_llama(tied=tied)
    batches = [{"input_ids": part} for part in tokens_of(4).split(2)]
    whole = swept(Sweep(LiveModel(model), batches, tmp_path / "whole"))
    done: list[str] = []
    found: dict[str, list[Sums]] = {}
    while "tied" not in done:
        for gate, sums in Sweep(LiveModel(model), batches, tmp_path / "parts").run(done):
            done.append(gate)
            found |= sums
            break
    assert_same(found, whole)


def test_padding_does_not_count(tmp_path):
    model = sharp_llama()
    ids, mask = tokens_of(2, 16), torch.ones(2, 16, dtype=torch.long)
    mask[1, 8:] = 0
    sweep = Sweep(LiveModel(model), [{"input_ids": ids, "attention_mask": mask}], tmp_path)
    sums = swept(sweep)
    assert sweep.tokens == 24
    (use,) = sums["model.layers.1.mlp.down_proj"]
    assert (torch.cat(use.energies).view(2, 16)[1, 8:] == 0).all()


def test_nothing_but_padding_is_refused(tmp_path):
    batch = {"input_ids": tokens_of(1, 8), "attention_mask": torch.zeros(1, 8, dtype=torch.long)}
    with pytest.raises(EffllmError, match="nothing but padding"):
        swept(Sweep(LiveModel(sharp_llama()), [batch], tmp_path))


def test_a_block_that_gives_nan_is_named(tmp_path):
    model = sharp_llama()
    model.model.layers[1].mlp.down_proj.weight.data[3, 3] = torch.nan
    with pytest.raises(EffllmError, match=r"model\.layers\.1 returns NaN"):
        swept(Sweep(LiveModel(model), [{"input_ids": tokens_of()}], tmp_path))


def test_a_full_disk_is_found_out_before_it_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(EffllmError, match="hidden states"):
        swept(Sweep(LiveModel(sharp_llama()), [{"input_ids": tokens_of()}], tmp_path))


def test_an_expert_that_no_token_reached_is_given_its_layers_average():
    reached, idle = (Site(f"experts.up_proj.{n}", (4, 3), "block", "layer", expert=n) for n in (0, 1))
    sums = {reached.name: [Sums(reached.shape, 1, False)]}
    sums[reached.name][0].add_product(torch.randn(10, 1, 3), [torch.randn(10, 4)])
    share_experts(sums, [reached, idle])
    one = moments(sums[idle.name], 20)
    assert one is not None and float(one.metric.A.diagonal(dim1=1, dim2=2).min()) > 0
    assert torch.allclose(20 * one.rows.sum(), torch.ones(()))


@given(
    st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.sampled_from([0, 1, "same"]), st.sampled_from([1, 2]),
    st.sampled_from([1, 3]),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_patches_times_weight_is_the_convolution(groups, stride, padding, dilation, kernel):
    stride = 1 if padding == "same" else stride
    x, weight = torch.randn(2, 4, 9, 7), torch.randn(8, 4 // groups, kernel, kernel)
    out = F.conv2d(x, weight, None, stride, padding, dilation, groups)
    patches = tap._patches(x, weight, stride, padding, dilation, groups)
    product = torch.einsum("pgc,goc->pgo", patches, weight.view(groups, 8 // groups, -1)).flatten(1)
    assert torch.allclose(product, out.movedim(1, -1).flatten(0, -2), atol=1e-4)


def test_a_wide_input_has_a_metric_of_blocks(monkeypatch):
    site = Site("wide", (6, 40), "block", "layer")
    x, grads = torch.randn(50, 1, 40), [torch.randn(50, 6)]
    full = Sums(site.shape, 1, False)
    full.add_product(x, grads)
    monkeypatch.setattr("effllm.statistics.sums.WIDEST", 32)
    monkeypatch.setattr("effllm.statistics.sums.WIDTH", 16)
    blocks = Sums(site.shape, 1, False)
    blocks.add_product(x, grads)
    dense = Metric(blocks.A, 40).dense
    for start in range(0, 40, 16):
        part = slice(start, min(start + 16, 40))
        assert torch.allclose(dense[part, part], full.A[0][part, part], rtol=1e-4, atol=1e-4)
    errors = torch.randn(6, 40)
    expected = torch.einsum("rc,cd,rd->r", errors, dense, errors)
    assert torch.allclose(Metric(blocks.A, 40).energies(errors, torch.zeros(6)), expected, rtol=1e-4)


def test_a_tap_hears_a_weight_however_it_is_multiplied():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return (self.two.weight @ self.one(x).transpose(1, 2)).transpose(1, 2)

    net = Net()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    sites = [Site("one", (4, 5), "block"), Site("two", (3, 4), "block")]
    found = Tap(net, sites)
    x = torch.randn(2, 7, 5)
    with found:
        net(x).square().sum().backward()
    found.flush()
    assert torch.allclose(found.sums["one"][0].rows, found.sums["one"][0].rows) and len(found.sums) == 2
    inputs = net.one(x).flatten(0, 1)
    grads = 2 * inputs @ net.two.weight.t()
    expected = (inputs * grads.square().sum(1, keepdim=True)).t() @ inputs
    assert torch.allclose(found.sums["two"][0].A[0], expected, rtol=1e-4)
