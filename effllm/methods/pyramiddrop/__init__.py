"""PyramidDrop: fewer visual tokens in deeper layers of a vision-language model."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from effllm.errors import EffllmError, UsageError, nearest
from effllm.method import Edit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from effllm.methods.pyramiddrop.ranking import Ranking

LEAST_RATIO = 0.2  # the steepest stage that a budget chooses before it moves the stages forward


def _attention(ranking: Ranking) -> Tensor:
    return ranking.attention()


def _random(ranking: Ranking) -> Tensor:
    """The same for a text alone and in a batch: a number for the first visual token, the second, ..."""
    numbers = torch.rand(ranking.visual.shape[1], generator=torch.Generator().manual_seed(0)).to(ranking.visual.device)
    return numbers[ranking.visual.cumsum(1) - 1]


def _variation(ranking: Ranking) -> Tensor:
    """How far a token moved in the last layer (V2Drop, without its other parts)."""
    moved: Tensor = (ranking.hidden - ranking.previous).float().norm(dim=-1)
    return moved


SCORERS: dict[str, Any] = {"attention": _attention, "variation": _variation, "random": _random}
"""Ranking -> scores `[batch, tokens]`; the visual tokens with the largest stay. Add one under a new name to use it."""


class PyramidDrop(Edit):
    """Drops visual tokens stage by stage: the deeper the layer, the fewer it sees.

    Before each of `layers` the visual tokens of a text are ranked by the attention that its last token pays them (that of
    the layer about to run, mean over heads), and as many as `ratios` says of the original number stay, in their order. By
    default the decoder is cut into `stages` equal stages, and each keeps `ratio` of the one before. A training text is
    ranked by the tokens before its answers. Texts without images, and prompts that end in one, are left alone. On a KV
    cache that goes on, each new turn (or chunk of a prompt) is ranked by its own last token, and what earlier ones dropped
    stays dropped. `torch.compile` must come after the edit: a compiled model would ignore it.

    Instead of `ratio`, one of `budget` (share of visual tokens, mean over layers), `average_tokens` (the same as a number)
    or `flops` (share of the decoder's multiplications for visual tokens) chooses ratios, and earlier layers where needed;
    the last two need a model with a fixed number of visual tokens.

    `positions: original` keeps every token's position. `compact` numbers those that are left anew at each stage, as the
    paper's code does; it needs one-dimensional rotary embeddings. Scores are fp32 and ties go to the earlier token.

    Source: Xing et al., "PyramidDrop", arXiv 2410.17247, section 3.2, and the ranking of its published code.
    """

    paper: ClassVar[str] = "arXiv 2410.17247"
    stages: int = Field(default=4, ge=1)
    ratio: float = Field(default=0.5, gt=0, le=1)
    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None
    budget: float | None = Field(default=None, gt=0, le=1)
    average_tokens: float | None = Field(default=None, gt=0)
    flops: float | None = Field(default=None, gt=0, le=1)
    min_tokens: int = Field(default=0, ge=0)
    positions: Literal["original", "compact"] = "original"
    scorer: str = "attention"

    @field_validator("scorer")
    @classmethod
    def _known(cls, scorer: str) -> str:
        if scorer not in SCORERS:
            raise ValueError(f"no scorer {scorer!r}: {nearest(scorer, SCORERS)}")
        return scorer

    @model_validator(mode="after")
    def _consistent(self) -> PyramidDrop:
        goals = [name for name in ("budget", "average_tokens", "flops") if getattr(self, name) is not None]
        if len(goals) > 1 or (goals and self.ratios is not None):
            raise ValueError(
                f"give one of ratios, budget, average_tokens and flops, not {', '.join([*goals, 'ratios'])}"
            )
        if self.layers is not None and list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must rise: {list(self.layers)}")
        if self.ratios is not None:
            if any(not 0 < ratio <= 1 for ratio in self.ratios) or list(self.ratios) != sorted(
                self.ratios, reverse=True
            ):
                raise ValueError(f"ratios must fall and lie above 0 and up to 1: {list(self.ratios)}")
            if len(self.ratios) != (self.stages - 1 if self.layers is None else len(self.layers)):
                raise ValueError(f"one ratio a layer: {len(self.ratios)} ratios")
        return self

    def attach(self, model: nn.Module) -> None:
        """Puts the hooks on a vision-language model of transformers, also under PEFT.

        Raises:
            EffllmError, UsageError: the model has no visual tokens, or its decoder cannot lose tokens half-way; layers out
                of range; PyramidDrop is on the model already.
        """
        from effllm.methods.pyramiddrop.hooks import VisualStream

        model = _base(model)
        usable = _usable_layers(model)
        if VisualStream.of(model) is not None:
            raise EffllmError("PyramidDrop is on this model already: remove it first (handle.remove())")
        if self.positions == "compact":
            _refuse_other_positions(model)
        schedule = self.schedule(model.config, usable)
        VisualStream(model, schedule, SCORERS[self.scorer], self.min_tokens, self.positions == "compact")

    def detach(self, model: nn.Module) -> None:
        """Takes the hooks off."""
        from effllm.methods.pyramiddrop.hooks import VisualStream

        stream = VisualStream.of(_base(model))
        if stream is not None:
            stream.remove()

    def schedule(self, config: Any, usable: list[int] | None = None) -> dict[int, float]:
        """Layer -> share of the visual tokens that it and later layers see, for a model's config.

        `usable` are the layers before which tokens may be dropped; all but the first by default.
        """
        depth = int(config.get_text_config().num_hidden_layers)
        usable = list(range(1, depth)) if usable is None else usable
        layers = list(self.layers or (depth * stage // self.stages for stage in range(1, self.stages)))
        if self.layers is not None and not set(self.layers) <= set(usable):
            bad = next(layer for layer in self.layers if layer not in usable)
            raise UsageError(
                f"tokens cannot be dropped before layer {bad}: the decoder has layers 0 to {depth - 1}, and those that see "
                f"the whole text and come after what every kind of layer needs first are {usable}"
            )
        if self.ratios is not None:
            pairs = zip(layers, self.ratios, strict=True)
            return {_snapped([layer], usable)[0]: ratio for layer, ratio in pairs if ratio < 1}
        layers = _snapped(layers, usable)
        share = self._share(config)
        if share is None:
            return {layer: self.ratio**stage for stage, layer in enumerate(layers, start=1) if self.ratio < 1}
        return self._solve(share, layers, usable, depth, config)

    def _share(self, config: Any) -> float | None:
        if self.average_tokens is not None:
            return self.average_tokens / visual_tokens(config)
        return self.budget if self.budget is not None else self.flops

    def _solve(self, goal: float, layers: list[int], usable: list[int], depth: int, config: Any) -> dict[int, float]:
        """The mildest schedule that meets `goal`: the given layers if a ratio of at least 0.2 will do, else earlier ones."""

        def cost(candidate: list[int], ratio: float) -> float:
            schedule = {layer: ratio**stage for stage, layer in enumerate(candidate, start=1)}
            return flops_share(schedule, config) if self.flops is not None else mean_share(schedule, depth)

        for tenths in range(10, 0, -1):
            candidate = _snapped([max(1, layer * tenths // 10) for layer in layers], usable)
            if self.layers is None and cost(candidate, LEAST_RATIO) > goal and tenths > 1:
                continue
            low, high = 0.0, 1.0
            for _ in range(50):
                middle = (low + high) / 2
                low, high = (middle, high) if cost(candidate, middle) <= goal else (low, middle)
            if low > 0.01:
                return {layer: low**stage for stage, layer in enumerate(candidate, start=1) if low < 1 - 1e-9}
            if self.layers is not None:
                break
        least = cost(_snapped(list(layers) if self.layers else [max(1, x // 10) for x in layers], usable), 0.01)
        raise UsageError(f"a share of {goal:.3g} cannot be reached: dropping nearly everything leaves {least:.3g}")


def apply_pyramiddrop(model: nn.Module, **settings: Any) -> Any:
    """Applies `PyramidDrop(**settings)` to a vision-language model; `remove()` of what comes back restores it exactly."""
    from effllm.edits import apply
    from effllm.registry import validated

    return apply(model, validated(PyramidDrop, settings, "pyramiddrop"))


_settings = inspect.signature(PyramidDrop).parameters.values()
_model = inspect.Parameter("model", inspect.Parameter.POSITIONAL_OR_KEYWORD)
apply_pyramiddrop.__signature__ = inspect.Signature([_model, *_settings])  # type: ignore[attr-defined]


def mean_share(schedule: dict[int, float], depth: int) -> float:
    """Visual tokens that a layer sees, mean over layers, as a share of all."""
    return sum(_shares(schedule, depth)) / depth


def _shares(schedule: dict[int, float], depth: int) -> list[float]:
    shares = [1.0]
    for layer in range(depth):
        shares.append(schedule.get(layer, shares[-1]))
    return shares[1:]


def flops_share(schedule: dict[int, float], config: Any) -> float:
    """Multiplications of the decoder for visual tokens alone, as a share of the dense model's (the paper's formula)."""
    text, count = config.get_text_config(), visual_tokens(config)
    width, inner, depth = int(text.hidden_size), int(text.intermediate_size), int(text.num_hidden_layers)

    def cost(tokens: float) -> float:
        return 4 * tokens * width**2 + 2 * tokens**2 * width + 3 * tokens * width * inner

    return sum(cost(share * count) for share in _shares(schedule, depth)) / (depth * cost(count))


def visual_tokens(config: Any) -> int:
    """How many tokens an image is in a model where that does not depend on the image.

    Raises:
        UsageError: it does.
    """
    fixed = {
        "llava": getattr(config, "image_seq_length", None),
        "gemma3": getattr(config, "mm_tokens_per_image", None),
        "paligemma": getattr(config.get_text_config(), "num_image_tokens", None),
    }.get(config.model_type)
    if not fixed:
        raise UsageError(
            f"{config.model_type} makes more tokens of a larger image, so neither a number of tokens nor a share of FLOPs "
            "is fixed: use budget="
        )
    return int(fixed)


def _base(model: nn.Module) -> PreTrainedModel:
    return cast("PreTrainedModel", getattr(model, "get_base_model", lambda: model)())


def _snapped(layers: Any, usable: list[int]) -> list[int]:
    """Each layer moved to the next usable one, without repeats."""
    found = [next((u for u in usable if u >= layer), usable[-1]) for layer in layers]
    return sorted(set(found))


def _usable_layers(model: PreTrainedModel) -> list[int]:
    """Layers before which tokens may be dropped: they see the whole text, and no later layer needs what is dropped."""
    from effllm.methods.pyramiddrop.hooks import layer_kinds, visual_token_ids

    name = type(model).__name__
    if hasattr(model, "_orig_mod"):
        raise EffllmError("a compiled model ignores what is put on it later: apply PyramidDrop first, then compile")
    if not hasattr(model, "get_decoder") or not hasattr(model, "config"):
        raise EffllmError(f"{name} is no transformers model with a decoder; PyramidDrop needs a vision-language model")
    text, vision = model.config.get_text_config(), getattr(model.config, "vision_config", None)
    kinds, layers = layer_kinds(text), getattr(model.get_decoder(), "layers", [])
    others = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    reasons = {
        "its images enter by cross-attention and are no tokens of the text": hasattr(text, "cross_attention_layers"),
        "its later layers share the keys and values of earlier ones": bool(getattr(text, "num_kv_shared_layers", 0)),
        "every layer takes inputs of its own for every token": bool(getattr(text, "hidden_size_per_layer_input", 0)),
        "its images are read by an encoder of text": bool(model.config.is_encoder_decoder),
        "its images enter once more at layers of the decoder that differ": hasattr(model.config, "deepstack_layer_map"),
        "its configuration names no image or video token": not visual_token_ids(model),
        f"its {', '.join(others)} layers carry a state that has seen the dropped tokens": bool(others),
        "none of its layers sees more than a sliding window (clear the text config's sliding_window if texts are shorter)": (
            "full_attention" not in kinds
        ),
        "its decoder has no list of layers with self_attn": not layers
        or not all(hasattr(layer, "self_attn") for layer in layers),
    }
    for reason, holds in reasons.items():
        if holds:
            raise EffllmError(f"PyramidDrop cannot act on {name}: {reason}")
    deep = len(getattr(vision, "deepstack_visual_indexes", None) or ())
    first = max(1, deep, *(kinds.index(kind) + 1 for kind in set(kinds)))
    usable = [index for index in range(first, len(kinds)) if kinds[index] == "full_attention"]
    if not usable:
        raise EffllmError(
            f"PyramidDrop cannot act on {name}: no layer with full attention comes after its first {first}"
        )
    return usable


def _refuse_other_positions(model: PreTrainedModel) -> None:
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if "mrope_section" in rope or any(isinstance(value, dict) for value in rope.values()):
        raise UsageError(
            f"positions='compact' needs one rotary embedding with one position a token, and {type(model).__name__} has "
            "several: use positions='original'"
        )
