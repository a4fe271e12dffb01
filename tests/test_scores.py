"""Scores against direct computations, and how many blocks a plan gives the high width."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import save, tiny_gpt2, tiny_llama
from hypothesis import given
from hypothesis import strategies as st
from transformers import OPTConfig, OPTForCausalLM

from effllm.checkpoint import Checkpoint
from effllm.method import Score
from effllm.plans import load_plan
from effllm.registry import from_spec, methods
from effllm.source import LiveModel, StoredModel


def tiny_opt() -> OPTForCausalLM:
    """An OPT with a matrix between its embedding and its blocks."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=512, hidden_size=256, ffn_dim=384, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=128,
        bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    return OPTForCausalLM(config).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def model():
    return tiny_llama(layers=3)


@pytest.fixture
def batches(tokens) -> list[dict[str, torch.Tensor]]:
    """Batches of unequal size: a mean of means would differ from the mean."""
    return [{"input_ids": tokens[:, :16]}, {"input_ids": tokens[:1, 1:]}]


def score(spec, source, batches=()) -> dict[str, float]:
    return from_spec(spec, Score).score(source, list(batches))


@torch.no_grad()
def direct_lim(model, batches, per_token: bool) -> dict[str, float]:
    """LIM from hooks on a plain forward of the whole model."""
    cosines: dict[str, list[torch.Tensor]] = {}

    def hook(name):
        def note(module, args, kwargs, output):
            before = (args[0] if args else kwargs["hidden_states"]).float()
            after = (output[0] if isinstance(output, tuple) else output).float()
            if not per_token:
                before, after = before.flatten(1), after.flatten(1)
            cosines.setdefault(name, []).append(F.cosine_similarity(before, after, dim=-1).flatten())

        return note

    blocks = LiveModel(model).blocks
    handles = [model.get_submodule(b).register_forward_hook(hook(b), with_kwargs=True) for b in blocks]
    for batch in batches:
        model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: -float(torch.cat(values).mean()) for name, values in cosines.items()}


@pytest.mark.parametrize("reduce", ["token", "sequence"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_lim_is_the_negative_cosine_of_a_plain_forward(make, reduce, batches):
    model = make()
    found = score({"lim": {"reduce": reduce}}, LiveModel(model), batches)
    assert found == pytest.approx(direct_lim(model, batches, reduce == "token"), abs=1e-6)


@torch.no_grad()
def test_lim_matches_the_hidden_states_that_the_model_returns(model, tokens):
    found = score("lim", LiveModel(model), [{"input_ids": tokens}])
    states = model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    for index in range(2):  # the state after the last block is normed
        cosine = F.cosine_similarity(states[index].float(), states[index + 1].float(), dim=-1)
        assert found[f"model.layers.{index}"] == pytest.approx(-float(cosine.mean()), abs=1e-6)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_zd_is_minus_the_share_of_weights_with_z_above_one(make):
    model = make()
    source = LiveModel(model)
    found = score("zd", source)
    for block in source.blocks:
        matrices = [m.weight for name, m in model.get_submodule(block).named_modules()
                    if hasattr(m, "weight") and m.weight.dim() == 2]  # fmt: skip
        flat = np.concatenate([w.detach().double().numpy().ravel() for w in matrices])
        share = np.mean((flat - flat.mean()) / flat.std() > 1)
        assert found[block] == pytest.approx(-share, abs=2e-5)


def test_zd_ranks_a_block_with_outliers_as_more_important(model):
    damaged = tiny_llama(layers=3)
    with torch.no_grad():
        damaged.model.layers[1].mlp.up_proj.weight[:4] *= 50
    found = score("zd", LiveModel(damaged))
    assert max(found, key=lambda block: found[block]) == "model.layers.1"


def test_random_is_drawn_from_its_seed(model):
    source = LiveModel(model)
    first, again, other = (score(f"random:seed={seed}", source) for seed in (0, 0, 1))
    assert first == again != other
    assert list(first) == source.blocks and len(set(first.values())) == 3


@pytest.mark.parametrize("reduce", ["token", "sequence"])
def test_reversed_is_minus_lim(model, batches, reduce):
    source = LiveModel(model)
    lim = score({"lim": {"reduce": reduce}}, source, batches)
    assert score({"reversed": {"reduce": reduce}}, source, batches) == {block: -value for block, value in lim.items()}


@pytest.mark.parametrize("name", [name for name, cls in methods().items() if issubclass(cls, Score)])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_opt])
def test_a_streamed_checkpoint_and_a_live_model_score_bit_for_bit_alike(make, name, batches, tmp_path):
    folder = save(make(), tmp_path / "model", shard="600KB")
    streamed = score(name, StoredModel(Checkpoint.open(folder)), batches)
    live = score(name, LiveModel(type(make()).from_pretrained(folder)), batches)
    assert streamed == live


def test_the_most_important_blocks_get_the_high_width():
    model = tiny_llama(layers=4)
    sites = LiveModel(model).sites
    plan = ordered(4, 2, 3.0)
    rank = {f"model.layers.{index}": value for index, value in enumerate((0.1, 0.4, 0.3, 0.2))}
    assigned = plan.assign(sites, {plan.scores()[0]: rank})
    high = {name.split(".")[2] for name, codec in assigned.items() if codec.bits == 4}
    low = {name.split(".")[2] for name, codec in assigned.items() if codec.bits == 2}
    assert (high, low) == ({"1", "2"}, {"0", "3"})


def ordered(high: int, low: int, average: float):
    step = {"sites": ["blocks"], "order": "lim", "high": f"quantize:bits={high}", "low": f"quantize:bits={low}",
            "average_bits": average}  # fmt: skip
    return load_plan({"steps": [step]})


@given(
    blocks=st.integers(1, 200),
    pair=st.sampled_from([(high, low) for high in (3, 4, 5, 6, 8) for low in (2, 3, 4, 5, 6) if low < high]),
    share=st.floats(0, 1),
)
def test_the_average_is_never_exceeded_and_one_block_more_would(blocks, pair, share):
    high, low = pair
    average = min(max(low + share * (high - low), low), high)
    count = ordered(high, low, average).steps[0].high_blocks(blocks)

    def mean(n: int) -> float:
        return low + (high - low) * n / blocks

    assert 0 <= count <= blocks
    assert mean(count) <= average + 1e-6
    assert count == blocks or mean(count + 1) > average


@pytest.mark.parametrize(
    ("blocks", "high", "low", "average", "count"),
    [
        (40, 4, 2, 3.5, 30),
        (18, 4, 2, 3.0, 9),
        (18, 4, 2, 3.5, 13),
        (32, 8, 4, 4.5, 4),
        (18, 8, 4, 4.0, 0),
        (7, 8, 4, 8.0, 7),
    ],
)
def test_counts_of_the_paper_and_of_the_presets(blocks, high, low, average, count):
    assert ordered(high, low, average).steps[0].high_blocks(blocks) == count


@pytest.mark.parametrize("blocks", [3, 7, 18, 26, 32, 61])
def test_every_count_can_be_asked_for_by_its_average(blocks):
    for count in range(blocks + 1):
        assert ordered(4, 2, 4 - 2 * (blocks - count) / blocks).steps[0].high_blocks(blocks) == count
