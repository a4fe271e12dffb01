"""PyramidDrop on tiny random models of twelve vision-language families, against a reference that shares no code with it."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from pyramiddrop_checks import (
    NEAR,
    VIDEOS,
    agrees,
    both_attentions,
    every_family,
    every_family_and_attention,
    rows_of,
    same,
    schedule_of,
)
from transformers import DynamicCache
from vision_language import (
    FAMILIES,
    IMAGE,
    TEXT,
    Reference,
    batch,
    generated,
    mixed,
    model_of,
    prepared,
    row,
)  # fmt: skip

from effllm.errors import EffllmError
from effllm.methods.pyramiddrop import (
    SCORERS,
    apply_pyramiddrop,
    hooks,
)


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
    share, kinds = 1.0, hooks.layer_kinds(model.config.get_text_config())
    slots = getattr(cache, hooks.KEY).slots
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
