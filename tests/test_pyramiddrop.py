"""PyramidDrop on tiny random models of twelve vision-language families, against a reference that shares no code with it."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import accelerate
import peft
import pytest
import torch
import transformers
from families import FAMILIES as OTHERS
from transformers import DynamicCache
from vision_language import (
    FAMILIES,
    IMAGE,
    TEXT,
    Reference,
    batch,
    generated,
    llava_1_5,
    mixed,
    mllama,
    model_of,
    only_windows,
    prepared,
    row,
    supervised,
    traces,
)  # fmt: skip

import effllm
from effllm.errors import EffllmError, UsageError
from effllm.methods import _visual_stream
from effllm.methods.pyramiddrop import SCORERS, PyramidDrop, _usable_layers, apply_pyramiddrop, flops_share, mean_share

CORE = ("llava", "qwen3_vl", "gemma3", "paligemma")  # tried with eager attention in the default run too
every_family = pytest.mark.parametrize("name", FAMILIES)
both_attentions = pytest.mark.parametrize("attention", ["sdpa", "eager"])
every_family_and_attention = pytest.mark.parametrize(
    ("name", "attention"),
    [
        pytest.param(name, attention, marks=[pytest.mark.slow] * (attention == "eager" and name not in CORE))
        for name in FAMILIES
        for attention in ("sdpa", "eager")
    ],
)
VIDEOS = [name for name, family in FAMILIES.items() if family.video]
NEAR = {"atol": 2e-5, "rtol": 0}


def same(found: Any, expected: Any) -> None:
    """The same tokens, and logits that differ by rounding only."""
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], **NEAR)


def rows_of(results: list[Any]) -> list[Any]:
    return [torch.cat(parts) for parts in zip(*results, strict=True)]


def agrees(model: Any, inputs: Any, steps: int = 5) -> Any:
    """What generation gives while PyramidDrop is on; it must be what the reference gives."""
    with apply_pyramiddrop(model):
        found = generated(model, inputs, steps)
    same(found, Reference(model, inputs, schedule_of(model)).generated(steps))
    return found


def schedule_of(model: Any, **settings: Any) -> dict[int, float]:
    return PyramidDrop(**settings).schedule(model.config, _usable_layers(model))


@every_family_and_attention
def test_cached_generation_gives_what_a_plain_recomputation_without_any_cache_gives(name, attention):
    model, inputs = model_of(name, attention), row(name, images=2)
    dense, logits = generated(model, inputs)[1], agrees(model, inputs)[1]
    assert (logits[:, 0] - dense[:, 0]).abs().max() > 0.05  # the drops matter, so the test can fail


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_are_dropped_like_images(name):
    agrees(model_of(name), row(name, images=1, videos=1))


@every_family_and_attention
def test_a_ratio_of_one_and_a_removed_edit_change_no_bit(name, attention):
    model, inputs = model_of(name, attention), batch(name, mixed(name))
    before = generated(model, inputs)
    with apply_pyramiddrop(model, ratio=1):
        kept_all = generated(model, inputs)
    with apply_pyramiddrop(model):
        generated(model, inputs, 2)
    after = generated(model, inputs)
    for one in (kept_all, after):
        assert torch.equal(one[0], before[0]) and torch.equal(one[1], before[1])


@every_family
def test_caches_hold_as_many_tokens_as_scheduled_in_order_and_all_text(name):
    model, inputs = model_of(name), row(name)
    visual = (inputs["input_ids"][0] == IMAGE).tolist()
    schedule, cache = schedule_of(model), DynamicCache(config=model.config.get_text_config())
    reference = Reference(model, inputs, schedule)
    reference.generated(1)
    with apply_pyramiddrop(model), torch.no_grad():
        model(**inputs, past_key_values=cache)
    share, kinds = 1.0, _visual_stream.layer_kinds(model.config.get_text_config())
    slots = getattr(cache, _visual_stream.KEY).slots
    for index, layer in enumerate(cache.layers):
        share = schedule.get(index, share)
        count = len(visual) - sum(visual) + int(sum(visual) * share)
        window = model.config.get_text_config().sliding_window if kinds[index] == "sliding_attention" else count + 1
        assert layer.keys.shape[-2] == min(count, window - 1)
        stage = sum(other <= index for other in schedule)
        assert stage == 0 or slots[stage][0].tolist() == reference.kept[index]
        assert {place for place, one in enumerate(visual) if not one} <= set(reference.kept[index])


@pytest.mark.parametrize("name", ["llava", "smolvlm", "mistral3", "paligemma"])
def test_compact_positions_are_numbered_anew_at_each_stage(name):
    model, rows = model_of(name), mixed(name)
    rows = [rows[0], rows[2], rows[3]]
    with apply_pyramiddrop(model, positions="compact"):
        together = generated(model, batch(name, rows))
        alone = [generated(model, one) for one in rows]
    same(together, rows_of(alone))
    for index, one in enumerate(rows):
        expected = Reference(model, one, schedule_of(model), compact=True).generated()
        same(alone[index], expected)
        original = Reference(model, one, schedule_of(model)).generated(1)[1]
        assert (original - expected[1][:, :1]).abs().max() > 0.01


def test_scores_that_soft_caps_bend_are_ranked_by_the_bent_ones():
    text = {**TEXT, "model_type": "gemma2", "attn_logit_softcapping": 1.0, "query_pre_attn_scalar": 4,
            "final_logit_softcapping": None, "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 4}  # fmt: skip
    config = copy.deepcopy(model_of("paligemma").config)
    config.text_config = transformers.Gemma2Config(**text, use_bidirectional_attention=True)
    model = prepared(transformers.PaliGemmaForConditionalGeneration._from_config(config), "eager")
    agrees(model, row("paligemma"))


def test_a_window_shorter_than_the_text_holds_over_a_long_answer():
    agrees(model_of("gemma3"), row("gemma3", images=2), 24)


def test_prompts_that_end_in_an_image_or_have_none_are_left_alone():
    model = model_of("llava")
    for inputs in (row("llava", images=0), row("llava", after=0)):
        if (inputs["input_ids"] == IMAGE).any():
            inputs = {
                **inputs,
                "input_ids": inputs["input_ids"][:, :-3],
                "attention_mask": inputs["attention_mask"][:, :-3],
            }
        dense = generated(model, inputs)[1]
        with apply_pyramiddrop(model):
            assert torch.equal(generated(model, inputs)[1], dense)


@pytest.mark.parametrize("scorer", ["random", "variation", "first", "equal"])
def test_other_scorers_run_and_rank_a_row_in_a_batch_as_alone(scorer, monkeypatch):
    monkeypatch.setitem(SCORERS, "first", lambda ranking: -ranking.visual.cumsum(1).float())
    monkeypatch.setitem(SCORERS, "equal", lambda ranking: torch.zeros_like(ranking.hidden[..., 0]))
    model, rows = model_of("llava"), mixed("llava")
    with apply_pyramiddrop(model, scorer=scorer):
        together = generated(model, batch("llava", rows))
        same(together, rows_of([generated(model, one) for one in rows]))
    with apply_pyramiddrop(model):
        assert (generated(model, batch("llava", rows))[1] - together[1]).abs().max() > 0.01
    with apply_pyramiddrop(model, scorer="first"):  # of equal scores the earlier ones stay
        assert scorer != "equal" or torch.equal(generated(model, batch("llava", rows))[1], together[1])


def test_min_tokens_keeps_at_least_so_many():
    model, cache = model_of("llava"), DynamicCache()
    inputs = row("llava")
    with apply_pyramiddrop(model, min_tokens=10), torch.no_grad():
        model(**inputs, past_key_values=cache)
    text = inputs["input_ids"].shape[1] - 25
    assert [layer.keys.shape[-2] - text for layer in cache.layers] == [25, 25, 12, 12, 10, 10, 10, 10]


@every_family_and_attention
def test_a_row_of_a_padded_batch_gives_what_it_gives_alone(name, attention):
    model, rows = model_of(name, attention), mixed(name)
    with apply_pyramiddrop(model):
        same(generated(model, batch(name, rows)), rows_of([generated(model, one) for one in rows]))
        for side in ("left", "right"):
            with torch.no_grad():
                out = model(**batch(name, rows, side), output_hidden_states=True)
                for index, one in enumerate(rows):
                    single, length = model(**one, output_hidden_states=True), one["input_ids"].shape[1]
                    part = slice(-length, None) if side == "left" else slice(0, length)
                    torch.testing.assert_close(out.logits[index, part], single.logits[0], **NEAR)
                    for states, expected in zip(out.hidden_states, single.hidden_states, strict=True):
                        torch.testing.assert_close(states[index, part], expected[0], atol=1e-4, rtol=1e-4)


@every_family_and_attention
def test_rows_that_drop_different_numbers_without_any_padding_do_not_mix(name, attention):
    model, long = model_of(name, attention), row(name, images=1, seed=1)
    length = long["input_ids"].shape[1]
    rows = [long, row(name, images=0, seed=2, before=5, after=length - 5)]
    with apply_pyramiddrop(model):
        joined = batch(name, rows)
        del joined["attention_mask"]
        same(generated(model, joined), rows_of([generated(model, one) for one in rows]))
        with torch.no_grad():
            expected = torch.cat([model(**one).logits for one in rows])
            torch.testing.assert_close(model(**joined).logits, expected, **NEAR)


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "idefics3"])
def test_masks_that_flash_attention_takes_give_what_sdpa_gives(name):
    model, rows = prepared(FAMILIES[name].make()), mixed(name)
    equal = [rows[0], row(name, 0, seed=2, after=rows[0]["input_ids"].shape[1] - 5)]
    cases = [rows[0], batch(name, rows), batch(name, equal)]
    with apply_pyramiddrop(model):
        expected = [generated(model, case) for case in cases]
        model.set_attn_implementation({"text_config": "flash_stand_in"})
        for case, result in zip(cases, expected, strict=True):
            same(generated(model, case), result)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_beams_of_a_batch_are_those_of_each_row(name):
    model, rows = model_of(name), mixed(name)[:3]
    with apply_pyramiddrop(model):
        together = generated(model, batch(name, rows), num_beams=3)[0]
        assert torch.equal(together, torch.cat([generated(model, one, num_beams=3)[0] for one in rows]))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "paligemma"])  # transformers' own differ there
def test_guessing_ahead_from_the_prompt_gives_the_greedy_tokens(name):
    model, inputs = model_of(name), row(name, after=9)
    inputs["input_ids"][0, -7:] = torch.tensor([11, 12, 13, 11, 12, 13, 11])  # so that the first step guesses already
    with apply_pyramiddrop(model):
        same(generated(model, inputs, 10, prompt_lookup_num_tokens=3), generated(model, inputs, 10))


def test_sampling_with_a_seed_repeats():
    model, found = model_of("llava"), []
    with apply_pyramiddrop(model):
        for _ in range(2):
            torch.manual_seed(3)
            found.append(generated(model, row("llava"), do_sample=True, top_k=20)[0])
    assert torch.equal(*found)


@both_attentions
@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("name", ["llava", "smolvlm", "mistral3"])
def test_a_second_turn_on_the_same_cache_ranks_its_own_images_only(name, images, attention):
    model, first, second = model_of(name, attention), row(name, 1, seed=1), row(name, images, seed=2)
    cache = DynamicCache()
    with apply_pyramiddrop(model):
        answer = generated(model, first, 3, past_key_values=cache)[0]
        ids = torch.cat([first["input_ids"], answer, second["input_ids"]], 1)
        inputs = {**second, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        copied = copy.deepcopy(cache)
        found = generated(model, inputs, past_key_values=cache)
        assert torch.equal(generated(model, inputs, past_key_values=copied)[1], found[1])
    whole = {**inputs, **{key: value for key, value in first.items() if "ixel" in key or "size" in key}}
    if images:
        pixels = [key for key in whole if "ixel" in key or "size" in key]
        whole |= {key: torch.cat([first[key], second[key]], dim=int(name == "smolvlm")) for key in pixels}
    start = first["input_ids"].shape[1]
    reference = Reference(model, whole, schedule_of(model))
    same(found, reference.generated(turns=[start, start + 2, ids.shape[1]]))


@pytest.mark.parametrize("size", [31, 64])
def test_a_prompt_read_in_chunks_is_ranked_chunk_by_chunk(size):
    model, inputs = model_of("llava"), row("llava", 2)
    length = inputs["input_ids"].shape[1]
    with apply_pyramiddrop(model):
        found = generated(model, inputs, prefill_chunk_size=size)
    same(found, Reference(model, inputs, schedule_of(model)).generated(turns=[*range(size, length, size), length]))


@both_attentions
def test_a_padded_batch_goes_on_for_a_second_turn(attention):
    model, rows, more = model_of("llava", attention), mixed("llava")[:3], torch.randint(10, 400, (3, 6))
    with apply_pyramiddrop(model):
        results = []
        for inputs, text in [(batch("llava", rows), more), *zip(rows, more.split(1), strict=True)]:
            cache = DynamicCache()
            answer = generated(model, inputs, 3, past_key_values=cache)[0]
            ids, mask = torch.cat([inputs["input_ids"], answer, text], 1), inputs["attention_mask"]
            mask = torch.cat([mask, torch.ones(len(text), 9, dtype=torch.long)], 1)
            results.append(generated(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache))
    same(results[0], rows_of(results[1:]))


def test_padding_counts_also_where_no_row_needs_a_filler():
    model, first = model_of("llava"), row("llava", 1)
    short = row("llava", 0, seed=2, after=first["input_ids"].shape[1] - 5 - 13)  # as long as the other after its drop
    with apply_pyramiddrop(model, layers=[4], ratios=[0.5]):
        rows = [first, short]
        same(generated(model, batch("llava", rows)), rows_of([generated(model, one) for one in rows]))
        results = []
        for count, padding in ((6, 0), (4, 0), (6, 2)):  # the third time both, the second padded in its second turn
            inputs = batch("llava", [first, first] if padding else [first])
            cache, more = DynamicCache(), torch.arange(20, 20 + count).repeat(len(inputs["input_ids"]), 1)
            ids = torch.cat([inputs["input_ids"], generated(model, inputs, 3, past_key_values=cache)[0], more], 1)
            mask = torch.ones_like(ids)
            if padding:
                ids[1, -6:], mask[1, -6:-4] = torch.tensor([0, 0, 20, 21, 22, 23]), 0
            results.append(generated(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=cache))
        same(results[2], rows_of(results[:2]))


def test_a_cache_cut_inside_the_dropped_tokens_is_refused_and_an_emptied_one_is_new():
    model, inputs, cache = model_of("llava"), row("llava"), DynamicCache()
    with apply_pyramiddrop(model), torch.no_grad():
        expected = model(**inputs, past_key_values=cache).logits
        cache.crop(-12)
        with pytest.raises(EffllmError, match="start again from an empty cache"):
            model(input_ids=torch.tensor([[5]]), past_key_values=cache)
        cache.reset()
        model(**inputs, past_key_values=cache)
    with apply_pyramiddrop(model, ratio=0.4), pytest.raises(EffllmError, match="another schedule"):
        model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache)
    with apply_pyramiddrop(model), torch.no_grad():
        cache.reset()
        assert torch.equal(model(**inputs, past_key_values=cache).logits, expected)


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith("qwen")])
def test_embeddings_in_place_of_ids_give_the_same(name):
    model, inputs = model_of(name), row(name)
    with apply_pyramiddrop(model), torch.no_grad():
        expected, logits = generated(model, inputs), model(**inputs).logits
        embeddings = model.get_input_embeddings()(inputs.pop("input_ids"))
        torch.testing.assert_close(model(**inputs, inputs_embeds=embeddings).logits, logits, **NEAR)
        if name not in ("gemma3", "paligemma"):  # whose generate takes ids only
            assert torch.equal(generated(model, {**inputs, "inputs_embeds": embeddings})[0], expected[0])


@every_family
def test_the_loss_of_a_batch_is_the_mean_of_its_rows(name):
    model = model_of(name)
    rows = [supervised(name, 2, 1), supervised(name, 0, 2, 20), supervised(name, 1, 3)]
    with apply_pyramiddrop(model), torch.no_grad():
        losses = torch.stack([model(**one).loss for one in rows])
        for side in ("left", "right"):
            torch.testing.assert_close(model(**batch(name, rows, side)).loss, losses.mean(), atol=1e-5, rtol=0)
        unanswered = {**rows[0], "labels": torch.full_like(rows[0]["labels"], -100)}
        logits = model(**unanswered).logits
    assert bool(losses.isfinite().all())
    with torch.no_grad():
        assert torch.equal(model(**unanswered).logits, logits)  # nobody asks, so nothing is dropped


def test_training_texts_are_ranked_by_the_token_before_the_answer():
    model, inputs = model_of("llava"), supervised("llava", 1, 1)
    prompt = {**inputs, "input_ids": inputs["input_ids"][:, :-4], "attention_mask": inputs["attention_mask"][:, :-4]}
    del prompt["labels"]
    with apply_pyramiddrop(model), torch.no_grad():
        expected = model(**prompt).logits[:, -1]
        torch.testing.assert_close(model(**inputs).logits[:, -5], expected, **NEAR)
        del inputs["labels"]
        assert (model(**inputs).logits[:, -5] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3"])
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model, found = prepared(FAMILIES[name].make()).train(), []
    inputs = batch(name, [supervised(name, 2, 1), supervised(name, 1, 2, 12)])
    with apply_pyramiddrop(model):
        for checkpoints in (False, True):
            if checkpoints:
                model.activation_checkpointing_enable()
            model.zero_grad()
            model(**inputs).loss.backward()
            found.append({key: weight.grad for key, weight in model.named_parameters() if weight.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, gradient in found[0].items():
        assert torch.equal(gradient, found[1][key]) and bool(gradient.isfinite().all()), key


@pytest.mark.parametrize("first", ["edit", "adapter"])
def test_lora_trains_and_is_ranked_with(first):
    base = prepared(FAMILIES["llava"].make())
    config = peft.LoraConfig(target_modules=r".*language_model.*(q_proj|v_proj)", init_lora_weights=False, r=4)
    handle = apply_pyramiddrop(base) if first == "edit" else None
    model = peft.get_peft_model(base, config).eval()
    handle = handle or apply_pyramiddrop(model)
    inputs = supervised("llava", 1, 1)
    out = model(**inputs)
    out.loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.requires_grad]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients) and any(bool(one.any()) for one in gradients)
    tokens, logits = generated(model, row("llava"))
    handle.remove()
    merged = model.merge_and_unload()
    expected = Reference(merged, row("llava"), schedule_of(merged)).generated()
    assert torch.equal(tokens, expected[0]) and not traces(merged)[0]
    torch.testing.assert_close(logits, expected[1], atol=1e-4, rtol=0)
    with apply_pyramiddrop(merged), torch.no_grad():
        torch.testing.assert_close(merged(**inputs).loss, out.loss, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["effllm", "bitsandbytes", "bfloat16", "offloaded"])
def test_packed_and_offloaded_weights_are_ranked_as_they_compute(kind):
    model = prepared(FAMILIES["llava"].make())
    if kind == "effllm":
        model = effllm.compress(model, "uniform-8bit")
    elif kind == "bitsandbytes":
        bitsandbytes = pytest.importorskip("bitsandbytes")
        for layer in model.get_decoder().layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                dense = getattr(layer.self_attn, name)
                packed = bitsandbytes.nn.Linear4bit(dense.in_features, dense.out_features, bias=False)
                packed.load_state_dict(dense.state_dict())
                setattr(layer.self_attn, name, packed.to("cpu"))
    elif kind == "offloaded":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    inputs = row("llava")
    if kind == "bfloat16":
        model, inputs = model.bfloat16(), {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()}
    if kind != "bfloat16":
        agrees(model, inputs)
        return
    with apply_pyramiddrop(model):
        logits = generated(model, inputs)[1]
    expected = Reference(model, inputs, schedule_of(model)).generated(1)[1]
    assert bool(logits.isfinite().all()) and logits.shape == (1, 5, 512)
    torch.testing.assert_close(logits[:, :1].float(), expected.float(), atol=0.3, rtol=0)


@every_family
def test_outputs_keep_their_shapes(name):
    model, inputs = model_of(name), batch(name, mixed(name))
    with torch.no_grad():
        dense = model(**inputs, output_hidden_states=True)
        with apply_pyramiddrop(model):
            full = model(**inputs, output_hidden_states=True)
            last = model(**inputs, logits_to_keep=1).logits
            parts = model(**inputs, return_dict=False)
            places = inputs.pop("input_ids"), inputs.pop("pixel_values"), inputs.pop("attention_mask")
            if name == "llava":
                assert torch.equal(model(*places, **inputs).logits, full.logits)
    assert full.logits.shape == dense.logits.shape and [x.shape for x in full.hidden_states] == [
        x.shape for x in dense.hidden_states
    ]
    torch.testing.assert_close(last, full.logits[:, -1:], **NEAR)
    torch.testing.assert_close(parts[0], full.logits, **NEAR)


def test_removal_leaves_no_trace_however_often_and_a_second_edit_is_refused(tmp_path):
    model = prepared(FAMILIES["llava"].make())
    model.save_pretrained(tmp_path / "before")
    generated(model, row("llava"), 2)  # transformers leaves hooks of its own
    before = traces(model)
    for _ in range(3):
        handle = apply_pyramiddrop(model)
        count = len(traces(model)[0])
        with pytest.raises(EffllmError, match="on this model already: remove it first"):
            apply_pyramiddrop(model, ratio=0.3)
        assert count == len(traces(model)[0]) == 4 + 8
        generated(model, row("llava"), 2)
        handle.remove()
        handle.remove()
        assert traces(model) == before
    with apply_pyramiddrop(model):
        model.save_pretrained(tmp_path / "during")
        twin = copy.deepcopy(model)
    assert len(traces(twin)[0]) == count
    for file in (tmp_path / "before").iterdir():
        assert file.read_bytes() == (tmp_path / "during" / file.name).read_bytes()
    old = apply_pyramiddrop(model)
    old.remove()
    with apply_pyramiddrop(model):
        old.remove()  # takes off only what it put on
        assert len(traces(model)[0]) == count


def test_threads_do_not_see_each_other():
    model, rows = model_of("llava"), [*mixed("llava"), row("llava", seed=9)]
    with apply_pyramiddrop(model):
        expected = [generated(model, one)[1] for one in rows]
        with ThreadPoolExecutor(len(rows)) as pool:
            found = list(pool.map(lambda one: generated(model, one)[1], rows))
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)


def test_a_scorer_may_run_the_model_itself(monkeypatch):
    model, inputs = model_of("llava"), row("llava")

    def nested(ranking: Any) -> Any:
        if nested.depth == 0:
            nested.depth = 1
            model(**row("llava", 2, seed=5))
            nested.depth = 0
        return ranking.attention()

    nested.depth = 0
    monkeypatch.setitem(SCORERS, "nested", nested)
    with apply_pyramiddrop(model):
        expected = generated(model, inputs)[1]
    with apply_pyramiddrop(model, scorer="nested"):
        assert torch.equal(generated(model, inputs)[1], expected)


def test_an_error_inside_a_forward_leaves_nothing_behind():
    model, inputs = model_of("llava"), row("llava")

    def fails(*_: Any) -> None:
        raise ValueError("broken")

    with apply_pyramiddrop(model):
        expected = generated(model, inputs)[1]
        for module in (model, model.get_decoder(), model.get_decoder().layers[5]):
            for register in (module.register_forward_pre_hook, module.register_forward_hook):
                hook = register(fails)
                with pytest.raises(ValueError, match="broken"):
                    model(**inputs)
                hook.remove()
                assert _visual_stream._running.get() is None
        assert torch.equal(generated(model, inputs)[1], expected)


@pytest.mark.slow
def test_a_model_compiled_after_the_edit_computes_the_same():
    model, inputs = model_of("llava"), row("llava")
    with apply_pyramiddrop(model), torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, **NEAR)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (mllama, "cross-attention"),
        (OTHERS["gemma3n"], "inputs of its own for every token"),
        (OTHERS["gemma4, images"], "inputs of its own for every token"),
        (OTHERS["qwen3_5, images"], "linear_attention layers"),
        (OTHERS["llama"], "no image or video token"),
        (OTHERS["plain module"], "needs a vision-language model"),
        (only_windows, "more than a sliding window"),
        (lambda: torch.compile(model_of("llava"), backend="eager"), "first, then compile"),
    ],
)
def test_models_that_cannot_lose_tokens_are_refused_by_name(make, reason):
    model = make()
    with pytest.raises(EffllmError, match=reason) as error:
        apply_pyramiddrop(model)
    assert type(model).__name__ in str(error.value) or "compile" in reason


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [8], "ratios": [0.5]}, "layers 0 to 7"),
        ({"layers": [0], "ratios": [0.5]}, "before layer 0"),
        ({"layers": [4, 2], "ratios": [0.5, 0.2]}, "layers must rise"),
        ({"layers": [2, 4], "ratios": [0.2, 0.5]}, "ratios must fall"),
        ({"layers": [2], "ratios": [1.5]}, "up to 1"),
        ({"layers": [2], "ratios": [0.0]}, "above 0"),
        ({"layers": [2, 4], "ratios": [0.5]}, "one ratio a layer"),
        ({"ratio": 0}, "greater than 0"),
        ({"budget": 0.5, "ratios": [0.5, 0.4, 0.3]}, "one of ratios, budget"),
        ({"budget": 0.5, "flops": 0.5}, "not budget, flops"),
        ({"budget": 0.05}, "cannot be reached"),
        ({"scorer": "atention"}, "did you mean 'attention'"),
        ({"layer": [3]}, "did you mean 'layers'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(UsageError, match=message):
        apply_pyramiddrop(model_of("llava"), **settings)
    assert not traces(model_of("llava"))[0]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("qwen3_vl", {"layers": [1], "ratios": [0.5]}, r"are \[2, 3"),
        ("gemma3", {"layers": [4], "ratios": [0.5]}, r"are \[3, 5, 7\]"),
        ("internvl", {"average_tokens": 4}, "use budget="),
        ("llava_next", {"flops": 0.5}, "use budget="),
        ("qwen2_vl", {"positions": "compact"}, "use positions='original'"),
        ("gemma3", {"positions": "compact"}, "use positions='original'"),
    ],
)
def test_settings_that_a_family_does_not_allow_are_refused(name, settings, message):
    with pytest.raises(UsageError, match=message):
        apply_pyramiddrop(model_of(name), **settings)


def test_calls_whose_masks_would_be_wrong_are_refused():
    model, inputs = model_of("llava"), row("llava", 2)
    length = inputs["input_ids"].shape[1]
    packed = torch.cat([torch.arange(20), torch.arange(length - 20)]).unsqueeze(0)
    bare = {key: value for key, value in inputs.items() if key != "attention_mask"}
    square = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    calls = [
        ({**bare, "position_ids": packed, "use_cache": False}, "packed sequence"),
        ({**bare, "cu_seq_lens_q": torch.tensor([0, 20, length])}, "packed sequence"),
        ({**bare, "attention_mask": square}, r"pass attention_mask as \[batch, tokens so far\]"),
    ]
    with apply_pyramiddrop(model), torch.no_grad():
        for call, message in calls:
            with pytest.raises(EffllmError, match=message):
                model(**call)
        with pytest.raises(EffllmError, match="use the dynamic cache"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        with pytest.raises(EffllmError, match="not its inner model or its forward"):
            model.forward(**inputs)
        generated(model, row("llava", 0), 2, cache_implementation="static")  # no images, nothing to drop
    model = prepared(FAMILIES["gemma3"].make())
    model.set_attn_implementation({"text_config": "flash_stand_in"})
    with apply_pyramiddrop(model), pytest.raises(EffllmError, match=r"set_attn_implementation\('sdpa'\)"):
        model(**row("gemma3"))


def test_the_default_schedule_is_the_papers():
    schedule = PyramidDrop().schedule(llava_1_5())
    assert schedule == {8: 0.5, 16: 0.25, 24: 0.125}
    assert mean_share(schedule, 32) * 576 == 270
    assert flops_share(schedule, llava_1_5()) == pytest.approx(1.78 / 3.82, abs=0.002)


@pytest.mark.parametrize("budget", [0.9, 0.5, 0.33, 0.2, 0.12])
def test_a_budget_is_the_mean_share_of_tokens(budget):
    schedule = PyramidDrop(budget=budget).schedule(llava_1_5())
    assert mean_share(schedule, 32) == pytest.approx(budget, abs=1 / 32) and mean_share(schedule, 32) <= budget
    assert list(schedule.values()) == sorted(schedule.values(), reverse=True)


@pytest.mark.parametrize("tokens", [192, 128, 64])
def test_average_tokens_are_met_on_llava(tokens):
    schedule = PyramidDrop(average_tokens=tokens).schedule(llava_1_5())
    counts = [int(576 * schedule[max(key for key in schedule if key <= layer)]) if layer >= min(schedule) else 576
              for layer in range(32)]  # fmt: skip
    assert sum(counts) / 32 == pytest.approx(tokens, abs=1)


def test_a_share_of_flops_is_met():
    schedule = PyramidDrop(flops=0.4).schedule(llava_1_5())
    assert flops_share(schedule, llava_1_5()) == pytest.approx(0.4, abs=1e-6)


def test_ratios_follow_their_layers_where_stages_are_moved():
    assert PyramidDrop(ratios=(0.5, 0.3, 0.1)).schedule(llava_1_5(), [20, 30]) == {20: 0.3, 30: 0.1}
    assert PyramidDrop(layers=(20,), ratios=(0.3,)).schedule(llava_1_5(), [20, 30]) == {20: 0.3}
