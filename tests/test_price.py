"""Prices: sampled rows stand for all, probes are measured KL, and a killed run ends with the same bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_tensors, save, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import effllm
from effllm import streaming
from effllm.checkpoint import Checkpoint
from effllm.methods.quantize import Quantize
from effllm.moments import Metric, Moments
from effllm.price import FEWEST, MOST, SHARE, price, sample_rows
from effllm.price.collect import collect_prices
from effllm.price.probe import divergence, probe
from effllm.source import LiveModel, StoredModel

CODECS = (Quantize(bits=3), Quantize(bits=4))


def weight_and_moments(rows: int, columns: int, spread: float, seed: int = 0) -> tuple[Tensor, Moments]:
    """A matrix whose rows differ in size and importance by the power `spread` of ten or so."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, columns, generator=generator) * (1 + torch.arange(columns) % 5)
    scale = 10 ** (spread * torch.randn(rows, 1, generator=generator))
    importance = 10 ** (spread * torch.randn(rows, generator=generator))
    weight = scale * torch.randn(rows, columns, generator=generator)
    return weight, Moments(Metric((x.T @ x / 300)[None], columns), importance / importance.sum())


@given(st.integers(1, 9000), st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=40, deadline=None)
def test_sampled_rows_are_few_and_distinct(rows, spread):
    weight, found = weight_and_moments(rows, 64, spread)  # of fewer columns the rows' norms are too different
    index, counts = sample_rows(weight, found)
    wanted = min(rows, max(FEWEST, min(MOST, rows // SHARE)))
    assert wanted - 1 <= len(index) <= wanted + 1
    assert len(index.unique()) == len(index) and (counts >= 1 - 1e-4).all()
    if spread == 0:
        assert float(counts.sum()) == pytest.approx(rows, rel=0.2)


@pytest.mark.parametrize("size", [1e-3, 1e-1, 1.0, 30.0])
def test_a_divergence_is_exact_however_small(size):
    generator = torch.Generator().manual_seed(0)
    own = 8 * torch.randn(4, 50_000, generator=generator)
    other = own + size * torch.randn(own.shape, generator=generator)
    p, q = (logits.double().log_softmax(-1) for logits in (own, other))
    torch.testing.assert_close(divergence(own, other).double(), (p.exp() * (p - q)).sum(-1), rtol=0.2, atol=0)
    assert torch.isfinite(divergence(own, torch.where(own > 20, -1e4, own))).all()


def test_a_matrix_of_few_rows_is_priced_whole():
    weight, found = weight_and_moments(48, 64, 0.5)
    assert price(CODECS, weight, found, sample_rows(weight, found)) == pytest.approx(price(CODECS, weight, found))


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0])
def test_sampled_prices_are_near_the_full_ones_and_on_neither_side(spread):
    ratios = []
    for seed in range(12):
        weight, found = weight_and_moments(1500, 64, spread, seed)
        sampled, full = (price(CODECS, weight, found, rows) for rows in (sample_rows(weight, found), None))
        ratios.append([one / other for one, other in zip(sampled, full, strict=True)])
    assert all(0.7 < ratio < 1.3 for row in ratios for ratio in row), ratios
    assert torch.tensor(ratios).mean() == pytest.approx(1, abs=0.05)


def test_an_error_that_no_output_feels_and_a_zero_weight_cost_nothing():
    weight, found = weight_and_moments(100, 64, 0.3)
    silent = Moments(found.metric, torch.zeros(100))
    assert price(CODECS, weight, silent, sample_rows(weight, silent)) == [0.0, 0.0]
    zero = torch.zeros(100, 64)
    assert price(CODECS, zero, found, sample_rows(zero, found)) == [0.0, 0.0]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stored", [True, False])
def test_a_probe_is_the_kl_that_the_whole_model_shows(tied, stored, tmp_path):
    model = tiny_llama(tied=tied, dtype=torch.float32, initializer_range=0.1)
    source: Any = LiveModel(model)
    if stored:
        source = StoredModel(Checkpoint.open(save(model, tmp_path / "model")), torch.float32)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 257, (4, 24), generator=generator)
    names = {"model.layers.1": "model.layers.1.mlp.down_proj.weight", "model.layers.0": "model.layers.0.mlp.up_proj.weight",
             "model.embed_tokens": "model.embed_tokens.weight"}  # fmt: skip
    names |= {} if tied else {"lm_head": "lm_head.weight"}
    changes = {}
    for unit, name in names.items():
        weight = model.state_dict()[name]
        changes[unit] = {name: weight + 0.1 * weight.std() * torch.randn(weight.shape, generator=generator)}
    batches = [{"input_ids": part} for part in ids.split(2)]
    found = probe(source, batches, {unit: unit for unit in names}, lambda unit: dict(changes[unit]))
    assert found.keys() == names.keys()
    with torch.no_grad():
        own = model(ids).logits
        for unit, name in names.items():
            before = model.state_dict()[name].clone()
            model.state_dict()[name].copy_(changes[unit][name])
            expected = float(divergence(own, model(ids).logits).mean())
            model.state_dict()[name].copy_(before)
            assert found[unit] == pytest.approx(expected, rel=1e-3), unit
    assert torch.equal(model(ids).logits, own)


def test_prices_that_stand_are_read_and_other_options_are_priced(tmp_path):
    source = LiveModel(tiny_llama(layers=2, dtype=torch.float32, initializer_range=0.1))
    batches = [{"input_ids": torch.randint(1, 257, (2, 24), generator=torch.Generator().manual_seed(0))}]
    options = {site.name: CODECS for site in source.sites}
    first = collect_prices(source, options, batches, tmp_path, "key")
    (journal,) = tmp_path.rglob("journal.jsonl")
    written = journal.read_bytes()
    again = collect_prices(source, options, batches, tmp_path, "key")
    assert (again.losses, again.probes) == (first.losses, first.probes) and journal.read_bytes() == written
    fewer = collect_prices(source, dict.fromkeys(options, CODECS[:1]), batches, tmp_path, "key")
    assert fewer.losses == first.losses
    other = Quantize(bits=6)
    more = collect_prices(source, dict.fromkeys(options, (*CODECS, other)), batches, tmp_path, "key")
    for name, losses in first.losses.items():
        assert more.losses[name].items() >= losses.items()
        assert more.losses[name][other.label()] < losses[CODECS[1].label()] < losses[CODECS[0].label()], name


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save(tiny_llama(initializer_range=0.1), tmp_path_factory.mktemp("price") / "llama")


@pytest.mark.parametrize("inputs", ["original", "compressed"])
def test_a_killed_rewrite_goes_on_to_the_same_bytes(folder, inputs, tmp_path, monkeypatch):
    plan = {"budget": "3.5bpw", "inputs": inputs, "calibration": {"samples": 4, "sequence_length": 32},
            "steps": [{"sites": ["*"], "choose": [codec.label() for codec in (*CODECS, Quantize(bits=2))]}]}  # fmt: skip
    effllm.compress_folder(folder, tmp_path / "whole", plan, check=False)
    original, left = streaming.write_shard, [0]

    def dies(*arguments: Any, **settings: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return original(*arguments, **settings)

    monkeypatch.setattr(streaming, "write_shard", dies)
    kills = 0
    while not (tmp_path / "parts").exists():
        left[0] = 1
        try:
            effllm.compress_folder(folder, tmp_path / "parts", plan, check=False)
        except KeyboardInterrupt:
            kills += 1
        assert kills < 20
    assert kills > 2
    whole, parts = read_tensors(tmp_path / "whole"), read_tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
