"""What PyramidDrop (arXiv 2410.17247) saves in time, memory and FLOPs, measured on a model of LLaVA-1.5's proportions.

    python evals/pyramiddrop.py --out results/pyramiddrop.json

The weights are random, so quality is not measured. Decoder, CLIP tower and projector have the proportions of LLaVA-1.5
(feed-forward 2.6875 times the width, heads of 128, a tower of a quarter of the width and three quarters of the layers); the
images stand in the middle of the text, 576 visual tokens each, so 2880 are the five tiles of LLaVA-NeXT.

Everything is timed interleaved: in each round every variant prefills once, then all decode step by step in turn. Other jobs
of a machine change wall clock a lot and CPU time of a thread less, so one thread computes and its CPU time
(time.thread_time) counts; wall clock stands beside it. Ratios are medians over pairs of runs, in brackets minimum over
minimum. Peak memory is what a prefill adds to that of a fresh process, the least of three.

FLOPs are counted by torch's FlopCounterMode over all that runs: tower, projector, text, ranking. It takes all of attention,
as the paper does; "causal" takes only the half that a causal kernel computes. The paper's formula counts visual tokens in
the decoder alone.

Written are OUT (JSON) and OUT with the suffix .md.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import effllm
from effllm.measure.result import machine, peak_memory, versions
from effllm.methods.pyramiddrop import SCORERS, PyramidDrop, flops_share

IMAGE, PATCH, VOCABULARY, TEXT = 7, 14, 2048, 64
RANDOM = "pyramid, random scorer"
VARIANTS: dict[str, Any] = {"dense": None, "pyramid": {}, RANDOM: {"scorer": "random"}, "keep all": {"ratio": 1.0}}
NOTE = "CPU time of one thread, median (minimum) of interleaved runs, as other jobs may run on the machine. Random weights."
RANKED: list[float] = []
Sample = tuple[float, float]  # CPU time of the thread, wall clock: seconds


def configuration(tokens: int, layers: int, width: int) -> LlavaConfig:
    """LLaVA-1.5 scaled to `width` and `layers`, each image `tokens` tokens."""
    side = math.isqrt(tokens)
    if side**2 != tokens:
        raise SystemExit(f"{tokens} visual tokens are neither a square number nor a multiple of 576")
    text = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=layers,
        num_attention_heads=max(2, width // 128), max_position_embeddings=32768, pad_token_id=0,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=width // 4, intermediate_size=width, num_hidden_layers=max(2, layers * 3 // 4),
        num_attention_heads=max(1, width // 256), image_size=side * PATCH, patch_size=PATCH, projection_dim=width // 4,
    )  # fmt: skip
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=tokens)


def build(tokens: int, layers: int, width: int, batch: int = 1) -> tuple[Any, dict[str, Any]]:
    """A random model, and prompts with `tokens` visual tokens: one image, or several of 576."""
    torch.manual_seed(0)
    images = tokens // 576 if tokens % 576 == 0 else 1
    model: Any = LlavaForConditionalGeneration(configuration(tokens // images, layers, width)).eval()
    words = torch.randint(IMAGE + 1, VOCABULARY, (batch, TEXT))
    ids = torch.cat([words[:, : TEXT // 2], torch.full((batch, tokens), IMAGE), words[:, TEXT // 2 :]], dim=1)
    side = model.config.vision_config.image_size
    return model, {"input_ids": ids, "pixel_values": torch.randn(batch * images, 3, side, side)}


def attention(ranking: Any) -> Any:
    """The scorer `attention`, its CPU time put on RANKED."""
    began = time.thread_time()
    scores = ranking.attention()
    RANKED.append(time.thread_time() - began)
    return scores


def turned(names: Iterable[str], by: int) -> list[str]:
    found = list(names)
    return found[by % len(found) :] + found[: by % len(found)]


def timed(model: Any, variant: str, **inputs: Any) -> tuple[Any, Sample]:
    """One forward under a variant, whose hooks go on before the clock starts and off after it stops."""
    with nullcontext() if VARIANTS[variant] is None else effllm.apply_pyramiddrop(model, **VARIANTS[variant]):
        wall, cpu = time.perf_counter(), time.thread_time()
        output = model(**inputs, use_cache=True, logits_to_keep=1)
        return output, (time.thread_time() - cpu, time.perf_counter() - wall)


def counted(model: Any, variant: str, prompt: dict[str, Any]) -> tuple[dict[str, int], list[int]]:
    """FLOPs of a prefill, and the bytes of keys and values that each layer keeps."""
    unseen = 0

    def sdpa(query: Any, key: Any, value: Any, dropout: float = 0.0, causal: bool = False, **rest: Any) -> Any:
        nonlocal unseen
        batch, heads, rows, width = query
        pair = 2 * batch * heads * (width + value[-1])
        unseen += pair * rows * (rows - 1) // 2 if causal else 0
        return pair * rows * key[2]

    operator: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch itself does not count it
    with FlopCounterMode(display=False, custom_mapping={operator: sdpa}) as counter:
        cache = timed(model, variant, **prompt)[0].past_key_values
    total = counter.get_total_flops()
    return {"full": total, "causal": total - unseen}, [2 * layer.keys.nbytes for layer in cache.layers]


def steps(run: Any, caches: dict[str, Any], count: int, mask: torch.Tensor | None = None) -> dict[str, list[Sample]]:
    """Single tokens decoded in turn by each variant, `run(variant, **inputs)`."""
    found: dict[str, list[Sample]] = {name: [] for name in caches}
    batch = 1 if mask is None else len(mask)
    for index in range(count):
        token = {"input_ids": torch.full((batch, 1), 100 + index % 1000)}
        if mask is not None:
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            token |= {"attention_mask": mask, "position_ids": (mask.sum(1) - 1).unsqueeze(1)}
        for name in turned(caches, index):
            found[name].append(run(name, past_key_values=caches[name], **token)[1])
    return found


def summary(samples: list[Sample]) -> dict[str, float]:
    """Median and least milliseconds."""
    cpu, wall = ([1000 * sample[which] for sample in samples] for which in (0, 1))
    return {"median": median(cpu), "min": min(cpu), "wall_median": median(wall)}


def ratio(samples: dict[str, list[Sample]], name: str = "pyramid") -> dict[str, float]:
    """Times of a variant over those of the dense model: median over pairs of runs, and minimum over minimum."""
    pairs = list(zip(samples[name], samples["dense"], strict=True))
    cpu, wall = (median(one[which] / other[which] for one, other in pairs) for which in (0, 1))
    return {"median": cpu, "min": min(samples[name])[0] / min(samples["dense"])[0], "wall_median": wall}


def measure(tokens: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures at one number of visual tokens."""
    model, prompt = build(tokens, arguments.layers, arguments.width)
    config = copy.deepcopy(model.config)
    config.image_seq_length = tokens
    schedule = PyramidDrop().schedule(config)
    passed = [[share for at, share in schedule.items() if at <= layer] for layer in range(arguments.layers)]
    planned = sum(TEXT + int(tokens * min(shares, default=1.0)) for shares in passed)
    say(f"{tokens} visual tokens: counting")
    counts = {name: counted(model, name, prompt) for name in VARIANTS}  # also warms up
    flops, cached = {name: both[0] for name, both in counts.items()}, {name: both[1] for name, both in counts.items()}
    prefill: dict[str, list[Sample]] = {name: [] for name in VARIANTS}
    decode: dict[str, list[Sample]] = copy.deepcopy(prefill)
    RANKED.clear()
    for index in range(arguments.repeats):
        caches = {}
        for name in turned(VARIANTS, index):
            output, sample = timed(model, name, **prompt)
            caches[name] = output.past_key_values
            prefill[name].append(sample)
        for name, samples in steps(partial(timed, model), caches, arguments.steps).items():
            decode[name] += samples
        say(f"{tokens} visual tokens: round {index + 1} of {arguments.repeats}")
    dense, pair = flops["dense"], ("dense", "pyramid")
    prefill_ms, decode_ms = ({name: summary(found[name]) for name in VARIANTS} for found in (prefill, decode))
    say(f"{tokens} visual tokens: peak memory in fresh processes")
    return {
        "tokens": tokens,
        "parameters": {name: sum(w.numel() for w in part.parameters()) for name, part in model.model.named_children()},
        "schedule": schedule,
        "prefill_ms": prefill_ms,
        "decode_ms": decode_ms,
        "prefill_ratio": ratio(prefill),
        "keep_all_ratio": ratio(prefill, "keep all"),
        "decode_ratio": ratio(decode),
        "flops": flops,
        "flops_ratio": {key: flops["pyramid"][key] / dense[key] for key in dense},
        "flops_share_of_paper": flops_share(schedule, config),
        "ranking_flops_share": (flops["pyramid"]["full"] - flops[RANDOM]["full"]) / dense["full"],
        "ranking_ms": 1000 * sum(median(RANKED[stage :: len(schedule)]) for stage in range(len(schedule))),
        "kv_bytes": {name: sum(cached[name]) for name in pair},
        "kv_bytes_per_layer": {name: cached[name] for name in pair},
        "kv_ratio": sum(cached["pyramid"]) / sum(cached["dense"]),
        "kv_ratio_of_schedule": planned / (arguments.layers * prompt["input_ids"].shape[1]),
        "prefill_peak_bytes": {name: peak(name, tokens, arguments) for name in pair},
    }


def peak(variant: str, tokens: int, arguments: argparse.Namespace) -> int:
    """Bytes that a prefill adds to the peak of a fresh process, the least of three."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as fresh:
        return min(fresh.map(added_peak, [variant] * 3, [tokens] * 3, [arguments] * 3))


def added_peak(variant: str, tokens: int, arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    model, prompt = build(tokens, arguments.layers, arguments.width)
    before = peak_memory()
    with torch.no_grad():
        timed(model, variant, **prompt)
    return peak_memory() - before


def hooks(arguments: argparse.Namespace, batch: int) -> dict[str, Any]:
    """What the hooks add to a decoding step of a narrow model, where nothing else hides them; a batch is padded."""
    model, prompt = build(36, arguments.layers, 64, batch)
    mask = torch.ones_like(prompt["input_ids"]) if batch > 1 else None
    if mask is not None:
        mask[0, :4] = 0
        prompt |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
    models = {name: copy.deepcopy(model) for name in ("dense", "keep all", "pyramid")}
    effllm.apply_pyramiddrop(models["keep all"], ratio=1.0)
    effllm.apply_pyramiddrop(models["pyramid"])
    caches = {name: timed(models[name], "dense", **prompt)[0].past_key_values for name in models}
    samples = steps(lambda name, **inputs: timed(models[name], "dense", **inputs), caches, 40 * arguments.steps, mask)
    pairs = {name: zip(some, samples["dense"], strict=True) for name, some in samples.items()}
    added = {name: 1e6 * median(one[0] - other[0] for one, other in found) for name, found in pairs.items()}
    return {name: {"added_us": added[name], **summary(some)} for name, some in samples.items()}


def markdown(document: dict[str, Any]) -> str:
    """The figures as tables."""
    results, settings = document["results"], document["settings"]

    def ms(kind: str, name: str) -> Any:
        return lambda row: "{median:.1f} ({min:.1f})".format(**row[kind][name])

    def over(name: str) -> Any:
        return lambda row: "{median:.3f} ({min:.3f}), wall {wall_median:.3f}".format(**row[name])

    def megabytes(key: str) -> Any:
        return lambda row: f"{row[key]['dense'] / 1e6:.1f} → {row[key]['pyramid'] / 1e6:.1f} MB"

    table = {f"prefill, ms: {name}": ms("prefill_ms", name) for name in VARIANTS} | {
        "**prefill time / dense**": over("prefill_ratio"),
        "**FLOPs / dense**, all that runs": lambda row: f"{row['flops_ratio']['full']:.3f}",
        "the same, causal half of attention": lambda row: f"{row['flops_ratio']['causal']:.3f}",
        "the paper's formula, visual tokens in the decoder": lambda row: f"{row['flops_share_of_paper']:.3f}",
        "ranking, share of dense FLOPs": lambda row: f"{row['ranking_flops_share']:.2%}",
        "ranking, share of dense time": lambda row: f"{row['ranking_ms'] / row['prefill_ms']['dense']['median']:.2%}",
        "prefill time / dense, keeping all": over("keep_all_ratio"),
        "decode, ms a token: dense": ms("decode_ms", "dense"),
        "decode, ms a token: pyramid": ms("decode_ms", "pyramid"),
        "**decode time / dense**": over("decode_ratio"),
        "KV cache": megabytes("kv_bytes"),
        "KV cache / dense (by the schedule)": lambda row: f"{row['kv_ratio']:.4f} ({row['kv_ratio_of_schedule']:.4f})",
        "KV cache by layer, MB": lambda row: ", ".join(f"{n / 1e6:.2f}" for n in row["kv_bytes_per_layer"]["pyramid"]),
        "peak memory that a prefill adds": megabytes("prefill_peak_bytes"),
    }
    lines = [
        f"{settings['layers']} layers of width {settings['width']}, {TEXT} text tokens, fp32, "
        f"{settings['repeats']} rounds; {document['machine']['cpu']}. {NOTE}", "",
        "| | " + " | ".join(f"{row['tokens']} visual tokens" for row in results) + " |", "|---" * (1 + len(results)) + "|",
        *(f"| {label} | " + " | ".join(map(show, results)) + " |" for label, show in table.items()), "",
        "| hooks, width 64: µs added to a decoding step | keep all | pyramid | dense step |", "|---|---|---|---|",
    ]  # fmt: skip
    for case, row in document["hooks"].items():
        figures = row["keep all"]["added_us"], row["pyramid"]["added_us"], 1000 * row["dense"]["median"]
        lines.append(f"| {case} | " + " | ".join(f"{figure:.0f}" for figure in figures) + " |")
    return "\n".join(lines) + "\n"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[576, 2880], help="visual tokens (576 2880)")
    parser.add_argument("--layers", type=int, default=8, help="decoder layers (8; a multiple of 4 to have 4 stages)")
    parser.add_argument("--width", type=int, default=1024, help="of the decoder (1024; a multiple of 64)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (7)")
    parser.add_argument(
        "--steps", type=int, default=8, help="tokens decoded in a round (8); 40 times as many by the narrow model"
    )
    parser.add_argument("--out", type=Path, default=Path("results/pyramiddrop.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    SCORERS["timed"], VARIANTS["pyramid"] = attention, {"scorer": "timed"}
    settings = {key: value for key, value in vars(arguments).items() if key != "out"}
    document: dict[str, Any] = {"note": NOTE, "machine": machine(), "versions": versions(), "settings": settings}
    with torch.no_grad():
        document["results"] = [measure(tokens, arguments) for tokens in arguments.tokens]
        say("hooks of a narrow model")
        document["hooks"] = {"no padding": hooks(arguments, 1), "a padded batch of 2": hooks(arguments, 2)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    arguments.out.with_suffix(".md").write_text(markdown(document), encoding="utf-8")
    print(markdown(document))


if __name__ == "__main__":
    main()
