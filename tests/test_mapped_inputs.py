"""Codecs that map a layer's inputs: the map is undone exactly, the metric follows, and what needs it gains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import save, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st
from reader import read

import effllm
from effllm.errors import UsageError
from effllm.layers.placing import codec_modules
from effllm.methods.awq import Awq
from effllm.methods.hadamard import Hadamard, block_size, rotation
from effllm.methods.quantize import Quantize
from effllm.moments import Metric, Moments
from effllm.registry import from_spec

BOTH = [Hadamard(codec=Quantize(bits=3)), Awq(codec=Quantize(bits=3), exponent=0.5)]


def weights(rows: int = 24, columns: int = 384) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def moments(rows: int = 24, columns: int = 384, outliers: int = 0) -> Moments:
    """Of correlated inputs, some of whose columns are large."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1000, 64, generator=generator) @ torch.randn(64, columns, generator=generator)
    x += torch.randn(1000, columns, generator=generator)
    x[:, ::48][:, :outliers] *= 10
    return Moments(Metric((x.t() @ x / 1000)[None], columns), torch.ones(rows) / rows)


@given(st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_a_rotation_is_orthogonal_whatever_the_width(columns):
    turn = Hadamard().into(torch.eye(columns), {})
    torch.testing.assert_close(turn @ turn.t(), torch.eye(columns))
    torch.testing.assert_close(Hadamard().back(turn, {}), torch.eye(columns))


def test_blocks_are_the_largest_power_of_two_that_divides_the_columns():
    assert [block_size(columns) for columns in (640, 4096, 11008, 96, 27)] == [64, 64, 64, 32, 1]
    block, signs = rotation(256, torch.float32, torch.device("cpu"))
    assert torch.equal(block, block.t()) and block.abs().unique().numel() == 1
    assert signs.flatten()[:16].tolist() == [1, 1, 1, -1, 1, 1, -1, 1, 1, 1, 1, -1, -1, -1, 1, -1], "Rudin-Shapiro"


@pytest.mark.parametrize("codec", BOTH, ids=lambda codec: codec.name())
def test_the_mapped_metric_prices_an_error_as_the_metric_does(codec):
    found, weight = moments(outliers=5), weights()
    data = codec.fit(weight, found)
    error = torch.randn(24, 384, generator=torch.Generator().manual_seed(2))
    mapped = codec._seen(found, data).costs(error)
    torch.testing.assert_close(mapped, found.costs(codec.back(error, data)), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("codec", BOTH, ids=lambda codec: codec.name())
def test_a_product_with_mapped_inputs_is_the_product_with_the_decoded_matrix(codec):
    found, weight = moments(outliers=5), weights()
    data = codec.refine(codec.encode(weight, found), weight, found)
    x = torch.randn(2, 7, 384, generator=torch.Generator().manual_seed(3))
    expected = x @ codec.decode(data, (24, 384)).t()
    torch.testing.assert_close(codec.linear(x, data, (24, 384)), expected, rtol=1e-4, atol=1e-3)
    assert codec.linear(x.bfloat16(), data, (24, 384)).dtype == torch.bfloat16


@pytest.mark.parametrize("codec", BOTH, ids=lambda codec: codec.name())
def test_each_of_several_options_is_what_it_is_alone(codec):
    found, weight = moments(), weights()
    options = [type(codec)(codec=Quantize(bits=bits)) for bits in (2, 3, 4)] + [codec]
    for one, data in zip(options, type(codec).encode_each(options, weight, found), strict=True):
        alone = one.encode(weight, found)
        assert data.keys() == alone.keys() and all(torch.equal(data[key], alone[key]) for key in data)


def test_rotating_spreads_outliers_that_a_grid_cannot_hold():
    weight, plain = weights(), Quantize(bits=3, group_size=128)
    weight[:, ::50] *= 20
    rotated = Hadamard(codec=plain)
    errors = [(codec.decode(codec.encode(weight), weight.shape) - weight).norm() for codec in (plain, rotated)]
    assert errors[1] < 0.8 * errors[0]
    assert plain.stored_bytes(weight.shape) == rotated.stored_bytes(weight.shape), "a rotation is not stored"


def test_scaling_spares_the_columns_with_large_inputs():
    weight, found, plain = weights(), moments(outliers=8), Quantize(bits=3, group_size=128, range="minmax")
    scaled = Awq(codec=plain, exponent=0.25)
    fit = scaled.fit(weight, found)
    data = {**plain.encode(scaled.into(weight, fit)), **fit}
    errors = [scaled.decode(data, weight.shape) - weight, plain.decode(plain.encode(weight), weight.shape) - weight]
    large = [found.metric.A[0].diagonal() > 1000, found.metric.A[0].diagonal() < 1000]
    one, other = ([error[:, columns].norm() for columns in large] for error in errors)
    assert one[0] < 0.9 * other[0] and other[1] < one[1] < 1.3 * other[1]
    assert found.costs(errors[0]).sum() < found.costs(errors[1]).sum()
    assert scaled.stored_bytes(weight.shape) == plain.stored_bytes(weight.shape) + 2 * 384


def test_the_codec_inside_comes_last_in_a_text_and_has_no_other_inside():
    spec = "awq:exponent=0.5,codec=quantize:bits=3,group_size=128"
    assert from_spec(spec) == Awq(exponent=0.5, codec=Quantize(bits=3, group_size=128))
    assert from_spec(Hadamard().label()) == Hadamard()
    for inside in ("hadamard", "awq"):
        with pytest.raises(UsageError, match=f"{inside} maps the inputs itself"):
            from_spec(f"hadamard:codec={inside}")
    with pytest.raises(UsageError, match="quantize: bits = '9'"):
        from_spec("hadamard:codec=quantize:bits=9")


def test_a_budget_may_choose_rotations_and_the_reader_knows_them(tmp_path):
    source = save(tiny_llama(initializer_range=0.1, layers=2, tied=False), tmp_path / "source")
    plan = {"budget": "3bpw", "effort": "fast", "steps": [{"sites": ["blocks"], "choose": ["quantize", "hadamard"]}]}
    effllm.compress_folder(source, tmp_path / "out", {**plan, "exclude": ["embeddings", "head"]}, check=False)
    model = effllm.load(tmp_path / "out")
    layers, found = codec_modules(model), read(tmp_path / "out")
    assert {layer.codec.name() for layer in layers.values()} == {"hadamard", "quantize"}
    for name, layer in layers.items():
        decoded = layer.codec.decode(layer.stored(), layer.matrix_shape).numpy()
        np.testing.assert_allclose(found[name], decoded, rtol=1e-4, atol=1e-6)


def test_mapped_layers_compile(tmp_path, tokens):
    model = tiny_llama(layers=1)
    effllm.compress(model, {"steps": [{"sites": ["blocks"], "use": "hadamard"}]})
    expected = model(tokens).logits
    torch.testing.assert_close(torch.compile(model, backend="eager")(tokens).logits, expected, rtol=0.05, atol=0.05)
