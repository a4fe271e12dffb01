"""Tiny random vision-language models of twelve families, prompts for them, and PyramidDrop written a second time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from families import build
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

IMAGE, VIDEO, BREAK, END, BEGIN = 500, 501, 502, 503, 504
SPECIAL = [0, IMAGE, VIDEO, BREAK, END, BEGIN]
TEXT = {
    "vocab_size": 512, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 512,
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 40, "patch_size": 8}  # fmt: skip
CLIP = {**VISION, "model_type": "clip_vision_model"}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False}
QWEN = {"depth": 2, "num_heads": 2, "patch_size": 4, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": END,
}
PINPOINTS = [[40, 80], [80, 40]]
Inputs = dict[str, Tensor]


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _plain(seed: int) -> Inputs:
    return {"pixel_values": _noise(seed, 1, 3, 40, 40)}


def _tiles(seed: int) -> Inputs:
    return {"pixel_values": _noise(seed, 1, 3, 3, 40, 40), "image_sizes": torch.tensor([[40, 72]])}


def _clip_of_frames(seed: int) -> Inputs:
    return {"pixel_values_videos": _noise(seed, 1, 2, 3, 40, 40)}


def _pixtral(seed: int) -> Inputs:
    return {"pixel_values": _noise(seed, 1, 3, 40, 40), "image_sizes": torch.tensor([[40, 40]])}


def _many(seed: int) -> Inputs:
    return {"pixel_values": _noise(seed, 1, 1, 3, 64, 64)}


def _patches(seed: int) -> Inputs:
    return {"pixel_values": _noise(seed, 48, 96), "image_grid_thw": torch.tensor([[1, 6, 8]])}


def _frames(seed: int) -> Inputs:
    return {"pixel_values_videos": _noise(seed, 48, 96), "video_grid_thw": torch.tensor([[2, 4, 6]])}


@dataclass(frozen=True)
class Family:
    """How a family's tiny model is built, and its inputs for one image (and one video)."""

    make: Callable[[], nn.Module]
    image: Callable[[int], Inputs]
    image_tokens: list[int]
    video: Callable[[int], Inputs] | None = None
    video_tokens: tuple[int, ...] = ()


def _llava(cls: str, text: str, vision: dict[str, Any], **settings: Any) -> Callable[[], nn.Module]:
    window = {"sliding_window": None} if text == "mistral" else {}
    return lambda: build(cls, text_config={**TEXT, **window, "model_type": text}, vision_config=vision,
                         image_token_index=IMAGE, **settings)  # fmt: skip


def _idefics(cls: str) -> Callable[[], nn.Module]:
    vision = {**VISION, "image_size": 64, "patch_size": 8}
    return lambda: build(cls, text_config={**TEXT, "model_type": "llama"}, vision_config=vision, image_token_id=IMAGE,
                         scale_factor=2)  # fmt: skip


def _qwen(cls: str, **vision: Any) -> Callable[[], nn.Module]:
    return lambda: build(
        cls, text_config={**TEXT, "rope_parameters": MROPE}, vision_config={**QWEN, **vision}, **QWEN_IDS
    )


GEMMA = {**TEXT, "query_pre_attn_scalar": 16, "sliding_window": 8,
         "layer_types": ["sliding_attention", "full_attention"] * 4}  # fmt: skip
FAMILIES: dict[str, Family] = {
    "llava": Family(_llava("LlavaForConditionalGeneration", "llama", CLIP, image_seq_length=25), _plain, [IMAGE] * 25),
    "llava_next": Family(
        _llava("LlavaNextForConditionalGeneration", "mistral", CLIP, image_grid_pinpoints=PINPOINTS), _tiles, [IMAGE] * 80
    ),
    "llava_onevision": Family(
        _llava("LlavaOnevisionForConditionalGeneration", "qwen2", SIGLIP, image_grid_pinpoints=PINPOINTS,
               video_token_index=VIDEO), _tiles, [IMAGE] * 80, _clip_of_frames, (VIDEO,) * 19,
    ),
    "qwen2_vl": Family(_qwen("Qwen2VLForConditionalGeneration", embed_dim=32, hidden_size=64), _patches,
                       [BEGIN] + [IMAGE] * 12 + [END], _frames, (VIDEO,) * 12),
    "qwen2_5_vl": Family(_qwen("Qwen2_5_VLForConditionalGeneration", window_size=16, fullatt_block_indexes=[1]), _patches,
                         [BEGIN] + [IMAGE] * 12 + [END], _frames, (VIDEO,) * 12),
    "qwen3_vl": Family(_qwen("Qwen3VLForConditionalGeneration", deepstack_visual_indexes=[0, 1],
                             num_position_embeddings=64), _patches, [BEGIN] + [IMAGE] * 12 + [END], _frames,
                       (*[VIDEO] * 6, 7, 8, *[VIDEO] * 6)),
    "internvl": Family(
        lambda: build("InternVLForConditionalGeneration", text_config={**TEXT, "model_type": "qwen2"},
                      vision_config={**VISION, "image_size": [48, 48]}, image_token_id=IMAGE, tie_word_embeddings=False),
        lambda seed: {"pixel_values": _noise(seed, 1, 3, 48, 48)}, [IMAGE] * 9,
    ),
    "smolvlm": Family(_idefics("SmolVLMForConditionalGeneration"), _many, [IMAGE] * 16),
    "idefics3": Family(_idefics("Idefics3ForConditionalGeneration"), _many, [BEGIN, *[IMAGE] * 8, 9, *[IMAGE] * 8, END]),
    "gemma3": Family(
        lambda: build("Gemma3ForConditionalGeneration", text_config=GEMMA, vision_config={**SIGLIP, "image_size": 48},
                      mm_tokens_per_image=9, image_token_index=IMAGE, boi_token_index=BEGIN, eoi_token_index=END),
        lambda seed: {"pixel_values": _noise(seed, 1, 3, 48, 48)}, [BEGIN, *[IMAGE] * 9, END],
    ),
    "paligemma": Family(_llava("PaliGemmaForConditionalGeneration", "gemma", {**SIGLIP, "projection_dim": 64},
                               hidden_size=64, projection_dim=64), _plain, [IMAGE] * 25),
    "mistral3": Family(
        _llava("Mistral3ForConditionalGeneration", "mistral",
               {**VISION, "model_type": "pixtral", "patch_size": 5, "head_dim": 16}), _pixtral,
        ([IMAGE] * 4 + [BREAK]) * 3 + [IMAGE] * 4 + [END],
    ),
}  # fmt: skip


@cache
def model_of(name: str, attention: str = "sdpa") -> Any:
    """The family's model in fp32, with weights that make its attention far from flat. Shared: take edits off again."""
    return prepared(FAMILIES[name].make(), attention)


def prepared(model: Any, attention: str = "sdpa") -> Any:
    """`model` in fp32, with larger weights and norms that are not all one."""
    generator = torch.Generator().manual_seed(2)
    model = model.float()
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=generator)
        weight.data = weight.data * 6 if weight.dim() > 1 else weight.data + 0.1 * noise
    model.generation_config.eos_token_id = None
    model.set_attn_implementation(attention)
    return model.eval()


def row(name: str, images: int = 1, videos: int = 0, seed: int = 0, before: int = 5, after: int = 7) -> Inputs:
    """One prompt: text, then images and videos with text after each."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(100 + seed)

    def words(count: int) -> list[int]:
        return torch.randint(10, 400, (count,), generator=generator).tolist()

    ids, parts = words(before), []
    for index in range(images):
        ids += family.image_tokens + words(3)
        parts.append(family.image(1000 * seed + index))
    for index in range(videos):
        assert family.video is not None
        ids += list(family.video_tokens) + words(3)
        parts.append(family.video(1000 * seed + 500 + index))
    tokens = torch.tensor([ids + words(after)])
    pixels = {key: torch.cat([part[key] for part in parts if key in part], dim=int(name in ("smolvlm", "idefics3")))
              for key in dict.fromkeys(key for part in parts for key in part)}  # fmt: skip
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), **kinds_of(name, tokens), **pixels}


def kinds_of(name: str, tokens: Tensor) -> Inputs:
    """The token types that a family wants."""
    if name.startswith("qwen"):
        return {"mm_token_type_ids": (tokens == IMAGE).int() + 2 * (tokens == VIDEO).int()}
    if name == "gemma3":
        return {"token_type_ids": (tokens == IMAGE).long()}
    return {"token_type_ids": torch.zeros_like(tokens)} if name == "paligemma" else {}


def batch(name: str, rows: list[Inputs], side: str = "left") -> Inputs:
    """Several prompts as one padded batch."""
    length = max(one["input_ids"].shape[1] for one in rows)
    joined: Inputs = {}
    for key in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "labels"):
        if key in rows[0]:
            spare = [length - one[key].shape[1] for one in rows]
            fill = -100 if key == "labels" else 0
            joined[key] = torch.cat([
                nn.functional.pad(one[key], (n, 0) if side == "left" else (0, n), value=fill)
                for one, n in zip(rows, spare, strict=True)
            ])  # fmt: skip
    for key in dict.fromkeys(key for one in rows for key in one if key not in joined):
        parts = [one[key] for one in rows if key in one]
        if name in ("smolvlm", "idefics3"):  # images by row, those that a row lacks are black
            most = max(part.shape[1] for part in parts)
            parts = [one.get(key, parts[0][:, :0]) for one in rows]
            parts = [nn.functional.pad(part, (0, 0, 0, 0, 0, 0, 0, most - part.shape[1])) for part in parts]
        joined[key] = torch.cat(parts)
    return joined


def generated(model: Any, inputs: Inputs, steps: int = 5, **settings: Any) -> tuple[Tensor, Tensor]:
    """New tokens and their logits, without any visual token among them."""
    settings = {"do_sample": False, "suppress_tokens": SPECIAL, **settings}
    out = model.generate(**inputs, max_new_tokens=steps, output_logits=True, return_dict_in_generate=True, **settings)
    return out.sequences[:, -steps:], torch.stack(out.logits, 1)


class Reference:
    """PyramidDrop once more, of one prompt, written plainly: no cache, no masks of its own, eager attention, lists.

    `turns` are the ends of the texts that came one after another, each ranked by its last token.
    """

    def __init__(self, model: Any, inputs: Inputs, schedule: dict[int, float], compact: bool = False):
        self.model, self.inputs, self.schedule, self.compact = model, inputs, schedule, compact
        self.kept: list[list[int]] = []

    def generated(self, steps: int = 5, turns: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """New tokens and their logits: after each token everything is computed anew."""
        ids, logits = self.inputs["input_ids"], []
        turns = turns or [ids.shape[1]]
        for _ in range(steps):
            logits.append(self.logits(ids, turns))
            allowed = logits[-1].index_fill(1, torch.tensor(SPECIAL), -torch.inf)
            ids = torch.cat([ids, allowed.argmax(-1, keepdim=True)], 1)
        return ids[:, -steps:], torch.stack(logits, 1)

    @torch.no_grad()
    def logits(self, ids: Tensor, turns: list[int]) -> Tensor:
        """Of the token after `ids`."""
        before = self.model.get_decoder().config._attn_implementation
        self.model.set_attn_implementation("eager")
        try:
            return self._logits(ids, turns)
        finally:
            self.model.set_attn_implementation(before)

    def _logits(self, ids: Tensor, turns: list[int]) -> Tensor:
        decoder, calls = self.model.get_decoder(), self._calls(ids)
        visual = ((ids == IMAGE) | (ids == VIDEO))[0].tolist()
        kept, self.kept = list(range(ids.shape[1])), []
        first = min(self.schedule)
        hidden = calls[first][0]
        for index, layer in enumerate(decoder.layers):
            if index in self.schedule:
                for start, end in zip([0, *turns], turns, strict=False):
                    members = [place for place in kept if start <= place < end and visual[place]]
                    scores = self._scores(layer, hidden, kept, calls[index][1])[kept.index(end - 1)].tolist()
                    members.sort(key=lambda place: (-scores[kept.index(place)], place))
                    gone = members[int(sum(visual[start:end]) * self.schedule[index]) :]
                    stays = [place for place in kept if place not in gone]
                    hidden = hidden[:, [kept.index(place) for place in stays]]
                    kept = stays
            self.kept.append(kept)
            if index >= first:
                hidden = layer(hidden, **self._arguments(hidden, kept, calls[index][1]))
        return self.model.get_output_embeddings()(decoder.norm(hidden))[:, -1]

    def _calls(self, ids: Tensor) -> list[tuple[Tensor, dict[str, Any]]]:
        """What each layer of the plain model is called with."""
        more, calls = ids.shape[1] - self.inputs["input_ids"].shape[1], []
        generated_kind = int(self.model.config.model_type == "paligemma")
        inputs = {**self.inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for key in ("mm_token_type_ids", "token_type_ids"):
            if key in inputs:
                inputs[key] = nn.functional.pad(inputs[key], (0, more), value=generated_kind)
        hooks = [layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args[0], kwargs)), with_kwargs=True)
                 for layer in self.model.get_decoder().layers]  # fmt: skip
        self.model(**inputs, use_cache=False)
        for hook in hooks:
            hook.remove()
        return calls

    def _arguments(self, hidden: Tensor, kept: list[int], call: dict[str, Any]) -> dict[str, Any]:
        rotary = tuple(table[:, kept] for table in call["position_embeddings"])
        if self.compact:
            rotary = self.model.get_decoder().rotary_emb(hidden, torch.arange(len(kept)).unsqueeze(0))
        return {"position_embeddings": rotary, "attention_mask": call["attention_mask"][:, :, kept][:, :, :, kept]}

    def _scores(self, layer: Any, hidden: Tensor, kept: list[int], call: dict[str, Any]) -> Tensor:
        """Attention of the layer about to run, from each token to each, mean over heads."""
        arguments = self._arguments(hidden, kept, call)
        return layer.self_attn(hidden_states=layer.input_layernorm(hidden), **arguments)[1][0].mean(0)


def mixed(name: str) -> list[dict[str, Any]]:
    """Prompts with two images, none and one, of different lengths."""
    return [
        row(name, 2, seed=1),
        row(name, 0, seed=2, after=20),
        row(name, 1, seed=3),
        row(name, seed=4, before=2, after=3),
    ]


def supervised(name: str, images: int, seed: int, after: int = 9) -> dict[str, Any]:
    inputs = row(name, images, seed=seed, after=after)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -4:] = inputs["input_ids"][:, -4:]
    return {**inputs, "labels": labels}


def traces(model: nn.Module) -> list[Any]:
    """Every attribute's name and every hook of ours in a model."""
    hooks = [hook for module in model.modules() for kind in ("_forward_pre_hooks", "_forward_hooks")
             for hook in getattr(module, kind).values()]  # fmt: skip
    ours = [hook for hook in hooks if "VisualStream" in repr(hook)]
    return [ours, [sorted(vars(module)) for module in model.modules()]]


def flash_stand_in(module, query, key, value, mask, scaling=None, position_ids=None, **kwargs):
    """Attention under the rules of flash attention: no mask but 2-D padding, causal from the end, no packed positions."""
    assert mask is None or (mask.dim() == 2 and mask.shape[1] == key.shape[2])
    assert position_ids is None or position_ids.shape[-1] == query.shape[2]
    assert position_ids is None or bool((position_ids.diff(dim=-1) == 1).all()) or mask is not None
    groups, last = query.shape[1] // key.shape[1], key.shape[2] - query.shape[2]
    scores = query @ key.repeat_interleave(groups, 1).transpose(-1, -2) * scaling
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(last)
    seen = seen if mask is None else seen & mask.bool()[:, None, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
    return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None


AttentionInterface.register("flash_stand_in", flash_stand_in)
AttentionMaskInterface.register("flash_stand_in", flash_attention_mask)


def mllama() -> Any:
    text = {
        **TEXT,
        "cross_attention_layers": [2],
        "vocab_size": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    with torch.device("meta"):
        return transformers.MllamaForConditionalGeneration._from_config(
            transformers.MllamaConfig(text_config=text, vision_config={"hidden_size": 32, "num_hidden_layers": 1})
        )


def only_windows() -> Any:
    config = copy.deepcopy(model_of("mistral3").config)
    config.text_config.sliding_window = 8
    return type(model_of("mistral3"))._from_config(config)


def llava_1_5() -> Any:
    """The sizes of LLaVA-1.5-7B: 32 layers, 576 tokens an image."""
    text = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    return transformers.LlavaConfig(text_config=text, image_seq_length=576)
