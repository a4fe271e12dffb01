"""PyramidDrop in use: training, adapters, packed weights, threads, refusals, schedules."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import accelerate
import peft
import pytest
import torch
from families import FAMILIES as OTHERS
from pyramiddrop_checks import (
    NEAR,
    agrees,
    every_family,
    schedule_of,
)
from vision_language import (
    FAMILIES,
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
from effllm.methods.pyramiddrop import (
    SCORERS,
    PyramidDrop,
    apply_pyramiddrop,
    flops_share,
    hooks,
    mean_share,
)


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
                assert hooks._running.get() is None
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
