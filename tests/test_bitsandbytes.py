"""bitsandbytes' formats: equal to what bitsandbytes computes, in tensors that no forward changes."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from conftest import read_tensors, tiny_llama
from hypothesis import given, settings
from hypothesis import strategies as st

import effllm
from effllm.errors import EffllmError, UsageError
from effllm.registry import from_spec
from effllm.site import find_sites

pytest.importorskip("bitsandbytes", reason="needs pip install 'effllm[bitsandbytes]'")

from effllm.methods.bitsandbytes import Bitsandbytes, load

SPECS = [
    "bitsandbytes",
    "bitsandbytes:blocksize=32,double_quant=true",
    "bitsandbytes:type=fp4",
    "bitsandbytes:type=int8",
]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def weights(rows: int = 48, columns: int = 256, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 256, 1024])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_4bit_equals_bitsandbytes(dtype, kind, blocksize, double_quant):
    functional = load().functional
    weight = weights(40, 1024).to(dtype)
    codec = Bitsandbytes(type=kind, blocksize=blocksize, double_quant=double_quant)
    data = codec.encode(weight)
    codes, state = functional.quantize_4bit(
        weight.float(), blocksize=blocksize, compress_statistics=double_quant, quant_type=kind
    )
    assert torch.equal(data["codes"].view(-1), codes.view(-1))
    assert torch.equal(data["absmax"].view(-1), state.absmax)
    assert torch.equal(codec.decode(data, (40, 1024)), functional.dequantize_4bit(codes, state))


@pytest.mark.parametrize("double_quant", [False, True])
def test_nf4_equals_the_weight_of_linear4bit(double_quant):
    bitsandbytes = load()
    weight = weights()
    layer = bitsandbytes.nn.Linear4bit(256, 48, bias=False, quant_type="nf4", compress_statistics=double_quant)
    layer.weight = bitsandbytes.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=double_quant
    )
    layer.to("cpu")
    codec = Bitsandbytes(double_quant=double_quant)
    theirs = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert torch.equal(codec.decode(codec.encode(weight), (48, 256)), theirs)


def test_int8_equals_the_weight_of_linear8bit():
    bitsandbytes = load()
    weight = weights()
    layer = bitsandbytes.nn.Linear8bitLt(256, 48, bias=False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
    layer.to("cpu")
    data = Bitsandbytes(type="int8").encode(weight)
    assert torch.equal(data["codes"], layer.weight.data) and torch.equal(data["absmax"], layer.weight.SCB)


@given(st.sampled_from(SPECS), st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_any_row_length_round_trips_and_is_counted(spec, columns):
    codec = from_spec(spec)
    weight = weights(5, columns)
    data = codec.encode(weight)
    decoded = codec.decode(data, (5, columns))
    assert decoded.shape == (5, columns)
    assert (decoded - weight).norm() < 0.2 * weight.norm()
    assert torch.equal(codec.decode_rows(data, torch.tensor([4, 1]), (5, columns)), decoded[[4, 1]])
    x = weights(3, columns, seed=1)
    torch.testing.assert_close(codec.linear(x, data, (5, columns)), x @ decoded.t(), rtol=1e-4, atol=1e-4)
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in data.items()}
    assert codec.layout((5, columns)) == layout
    blocks = 1 if codec.type == "int8" else -(-columns // codec.blocksize)
    scales = 5 * blocks + 4 * -(-5 * blocks // 256) + 4 if codec.double_quant else 4 * 5 * blocks
    codes = 5 * columns if codec.type == "int8" else 5 * -(-columns // 2)
    assert codec.stored_bytes((5, columns)) == codes + scales


@pytest.mark.parametrize("spec", SPECS)
def test_equal_bytes_whatever_the_chunking(spec, monkeypatch):
    import effllm.methods.bitsandbytes as module
    from effllm.methods import _by_rows

    codec = from_spec(spec)
    whole = codec.encode(weights())
    product = codec.linear(weights(3), whole, (48, 256))
    for each in (module, _by_rows):
        monkeypatch.setattr(each, "CHUNK", 1000)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in codec.encode(weights()).items())
    torch.testing.assert_close(codec.linear(weights(3), whole, (48, 256)), product)


@pytest.mark.parametrize("spec", SPECS)
def test_zeros_constants_and_extremes_stay_finite(spec):
    codec = from_spec(spec)
    for value in (0.0, 1e-9, 3.0, -3.0, 1e6):
        decoded = codec.decode(codec.encode(torch.full((2, 70), value)), (2, 70))
        assert bool(torch.isfinite(decoded).all())
        assert value != 0 or bool((decoded == 0).all())


@pytest.mark.parametrize("spec", SPECS)
def test_forwards_change_no_stored_byte(spec, tmp_path, tokens):
    model = tiny_llama()
    effllm.compress(model, {"steps": [{"sites": ["*"], "use": spec}]})
    model.save_pretrained(tmp_path / "before")
    expected = model(tokens).logits
    model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
    model.to(torch.float32)(tokens)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "after")
    for file in (tmp_path / "before").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "after" / file.name).read_bytes()
    assert torch.equal(effllm.load(tmp_path / "after")(tokens).logits, expected)
    assert "model.layers.0.mlp.up_proj.codes" in read_tensors(tmp_path / "after")


def test_gradients_flow_to_the_inputs(tokens):
    model = tiny_llama(dtype=torch.float32)
    effllm.compress(model, {"steps": [{"sites": ["blocks"], "use": "bitsandbytes"}]})
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    packed = torch.autograd.grad(model(inputs_embeds=embedded).logits.square().mean(), embedded)[0]
    model.dequantize()
    dense = torch.autograd.grad(model(inputs_embeds=embedded).logits.square().mean(), embedded)[0]
    torch.testing.assert_close(packed, dense, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("spec", SPECS)
def test_compiles_as_one_graph(spec):
    codec, x = from_spec(spec), weights(3, seed=1)
    data = codec.encode(weights())
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: codec.linear(x, data, (48, 256)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), codec.linear(x, data, (48, 256)))


def test_the_fused_product_gets_the_right_arguments():
    """On the CPU the operator decodes and multiplies, so that only what it is given is tested here."""
    x = weights(3, seed=1)
    for spec in SPECS[:3]:
        codec = from_spec(spec)
        data = codec.encode(weights())
        assert codec._fits_fused(x, (48, 256)) and not codec._fits_fused(x, (48, 200))
        torch.testing.assert_close(codec._fused(x, data, (48, 256)), codec.linear(x, data, (48, 256)))


def test_a_fresh_process_unpickles_quietly_and_decodes():
    """Nothing but the bytes of a codec says that bitsandbytes is needed; its import prints nothing of its own."""
    code = (
        "import pickle, sys, torch; codec = pickle.loads(sys.stdin.buffer.read()); "
        "print(codec.decode(codec.encode(torch.ones(2, 64)), (2, 64)).sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(Bitsandbytes(double_quant=True)),
        capture_output=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == (b"128.0\n", b"")


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(EffllmError, match=r"pip install 'effllm\[bitsandbytes\]'") as raised:
        from_spec("bitsandbytes")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("bitsandbytes:blocksize=48", "blocksize = 48: Input should be 32"),
        ("bitsandbytes:type=int8,blocksize=128", "blocksize = '128': .*one scale a row"),
        ("bitsandbytes:type=int8,double_quant=true", "double_quant = 'true': .*one scale a row"),
        ("bitsandbytes:type=nf5", "type = 'nf5': Input should be 'nf4'"),
    ],
)
def test_wrong_settings_are_named(spec, message):
    with pytest.raises(UsageError, match=message):
        from_spec(spec)


@needs_cuda
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("columns", [256, 200])
def test_cuda_decodes_and_multiplies_as_the_cpu(columns, spec):
    codec, weight = from_spec(spec), weights(96, columns)
    data = codec.encode(weight)
    moved = {name: tensor.cuda() for name, tensor in data.items()}
    decoded = codec.decode(data, (96, columns))
    torch.testing.assert_close(codec.decode(moved, (96, columns)).cpu(), decoded, rtol=1e-6, atol=1e-6)
    for rows in (1, 6, 64):
        x = weights(rows, columns, seed=1)
        product = codec.linear(x.cuda(), moved, (96, columns)).cpu()
        torch.testing.assert_close(product, x @ decoded.t(), rtol=1e-4, atol=1e-4)
    here = codec.decode(codec.encode(weight.cuda()), (96, columns)).cpu()
    assert (here - weight).norm() < 1.01 * (decoded - weight).norm()


@needs_cuda
@pytest.mark.parametrize("spec", SPECS)
def test_cuda_model_computes_as_on_the_cpu(spec, tokens):
    model = tiny_llama(dtype=torch.float32)
    effllm.compress(model, {"steps": [{"sites": ["*"], "use": spec}]})
    expected = model(tokens).logits
    torch.testing.assert_close(model.cuda()(tokens.cuda()).logits.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_grid_leaves_out_blocks_longer_than_a_row():
    site = find_sites(tiny_llama())[1]
    assert {codec.blocksize for codec in Bitsandbytes.grid(site)} == {32, 64, 128, 256}
