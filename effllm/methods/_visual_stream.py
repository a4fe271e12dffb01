"""Visual tokens that leave a decoder between its layers: the hooks that drop them, and what makes the rest of a model agree.

Nothing of a model's code is replaced. A hook on the model notes where its visual tokens are; one on the decoder puts a
`Stream` into the keyword arguments that reach every layer, so that state travels with the call; one on each layer takes it
out again, drops tokens where the schedule says so, and fits the layer's mask and rotary embeddings to those that are left.
After the last layer every position is filled again, a dropped one by the last kept one before it, so that logits, labels
and losses keep their shapes. What was kept is noted on the KV cache, which is all that decoding and later turns need.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, flash_attention_mask, sdpa_mask

from effllm.errors import EffllmError

KEY = "effllm_visual_stream"
PROBE = "effllm_probe"
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
_running: ContextVar[_Call | None] = ContextVar("effllm_visual_call", default=None)


_Hook = TypeVar("_Hook", bound=Callable[..., Any])


def _uncompiled(hook: _Hook) -> _Hook:
    """Keeps torch.compile from tracing a hook, whose results depend on values."""
    return cast(_Hook, torch.compiler.disable(hook))


@dataclass
class _Call:
    """One forward of the whole model: what only its own arguments tell."""

    owner: VisualStream
    outer: _Call | None
    visual: Tensor | None = None
    labels: Tensor | None = None
    mask: Any = None
    tail: int = 0
    """How many last positions have their logits asked for: all but the first of them may be guesses at an answer."""


@dataclass
class _Kept:
    """What a KV cache holds: `slots[stage]` `[batch, keys]`, the position of every key in the whole text, -1 a filler."""

    schedule: dict[int, float]
    slots: dict[int, Tensor]
    covered: int
    """Tokens that `slots` account for; those after them were all kept."""
    plain: bool
    """Whether no key is a filler or padding, so that a later token may see them all."""

    def cut(self, length: int) -> _Kept:
        """The same for a cache of which only the first `length` tokens are left."""
        gone = self.covered - length
        if any(bool((keys[:, -gone:] < length).any()) for keys in self.slots.values()):
            raise EffllmError(
                "the KV cache was cut where PyramidDrop had dropped tokens, and its layers no longer hold the same text: "
                "start again from an empty cache"
            )
        slots = {stage: keys[:, :-gone] for stage, keys in self.slots.items()}
        return _Kept(self.schedule, slots, length, self.plain)


class _Probed(Exception):
    """Ends a layer's forward once its queries and keys are known."""

    def __init__(self, query: Tensor, key: Tensor, scaling: float, softcap: float | None):
        self.query, self.key, self.scaling, self.softcap = query, key, scaling, softcap


def _probe(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    raise _Probed(query, key, kwargs.get("scaling") or query.shape[-1] ** -0.5, kwargs.get("softcap"))


AttentionInterface.register(PROBE, _probe)


@dataclass
class Ranking:
    """What a scorer may use at a drop: all `[batch, tokens, ...]` of the tokens that are left before it."""

    layer: Any
    hidden: Tensor
    previous: Tensor
    """Hidden states one layer earlier."""
    visual: Tensor
    queries: Tensor
    """Which tokens the ranking asks: the last of the prompt, or those before each answer of a training text."""
    allowed: Tensor
    """`[batch, tokens]`: tokens that are neither padding nor fillers."""
    cached: Tensor
    """`[batch, keys]`: which keys of the layer's KV cache, all from earlier turns, are neither."""
    kwargs: dict[str, Any]

    def attention(self) -> Tensor:
        """Attention from the queries to every token `[batch, tokens]` in fp32, mean over heads and queries.

        Queries and keys are those that this layer itself is about to compute (its norm, projections, rotary embedding).
        """
        rows = _left_filled(self.queries)
        probed = self._probe(rows.clamp_min(0))
        index = rows.clamp_min(0)[:, None, :, None].expand(-1, probed.query.shape[1], -1, probed.query.shape[-1])
        query, key, seen = probed.query.gather(2, index), probed.key, self._sees(rows)
        if self.cached.shape[1]:
            key = torch.cat([self.kwargs["past_key_values"].layers[self.layer.self_attn.layer_idx].keys, key], dim=2)
            seen = torch.cat([self.cached.unsqueeze(1).expand(-1, rows.shape[1], -1), seen], dim=2)
        query = query.float().unflatten(1, (-1, query.shape[1] // key.shape[1]))
        scores = query @ key.float().unsqueeze(2).transpose(-1, -2) * probed.scaling
        if probed.softcap is not None:
            scores = torch.tanh(scores / probed.softcap) * probed.softcap
        weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)[..., -self.hidden.shape[1] :]
        weights = weights.flatten(1, 2).mean(1).masked_fill((rows < 0).unsqueeze(-1), 0)
        return torch.div(weights.sum(1), (rows >= 0).sum(1, keepdim=True).clamp_min(1))

    def _sees(self, rows: Tensor) -> Tensor:
        """`[batch, queries, tokens]`: what the layer's mask lets each query see."""
        count = self.hidden.shape[1]
        mask = self.kwargs["attention_mask"]
        if mask is not None and mask.dim() == 4:
            seen = _take(mask[:, 0, :, -count:], rows)
            seen = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
        else:
            seen = torch.arange(count, device=rows.device) <= rows.unsqueeze(-1)
        seen = seen & self.allowed.unsqueeze(1)
        return seen | ~seen.any(-1, keepdim=True)

    def _probe(self, rows: Tensor) -> _Probed:
        """Runs a twin of the layer, which shares its weights, until its attention is called."""
        twin, attention = _twin(self.layer), _twin(self.layer.self_attn)
        twin._modules["self_attn"] = attention
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation_internal = PROBE
        for name in {"q_proj", "v_proj"} & attention._modules.keys():
            attention._modules[name] = _SomeRows(getattr(attention, name), rows)
        try:
            kwargs = {**self.kwargs, "past_key_values": None, "use_cache": False}
            type(self.layer).forward(twin, self.hidden, **kwargs)
        except _Probed as probed:
            return probed
        raise EffllmError(f"{type(self.layer).__name__} never called its attention, so its tokens cannot be ranked")


class _SomeRows(nn.Module):
    """A projection of a few rows; the others are zero."""

    def __init__(self, projection: nn.Module, rows: Tensor):
        super().__init__()
        self.projection, self.rows = projection, rows

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.projection(_take(x, self.rows))
        index = self.rows.unsqueeze(-1).expand_as(out)
        return out.new_zeros(*x.shape[:2], out.shape[-1]).scatter(1, index, out)


def _twin(module: Any) -> Any:
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    twin.__dict__["training"] = False
    return twin


Scorer = Callable[[Ranking], Tensor]
"""Scores `[batch, tokens]`; of the visual tokens those with the largest stay."""


@dataclass
class Stream:
    """One forward of the decoder: which tokens are left, and what later layers must be told."""

    call: _Call
    real: Tensor
    """`[batch, tokens]`: not padding."""
    past: int
    """Tokens before this forward, dropped ones included."""
    old: _Kept | None
    counts: list[int]
    """Visual tokens of each row."""
    form: Any
    """The function that made the masks."""
    stage: int = 0
    left: Tensor | None = None
    """Positions `[batch, tokens left]` within this forward, ascending, -1 a filler on the left; None while all are left."""
    stages: dict[int, Tensor | None] = field(default_factory=dict)
    lefts: list[Tensor | None] = field(default_factory=list)
    """`left` of each layer."""
    previous: Tensor | None = None
    memo: dict[tuple[int, str, int], Any] = field(default_factory=dict)

    def before(self, stage: int) -> Tensor:
        """Positions `[batch, keys]` of the keys that layers of `stage` hold from earlier forwards."""
        past = torch.arange(self.past, device=self.real.device).expand(len(self.real), -1)
        slots = self.old.slots.get(stage) if self.old is not None else None
        if slots is None or self.old is None:
            return past
        return torch.cat([slots.expand(len(self.real), -1), past[:, self.old.covered :]], dim=1)

    def keys(self, stage: int) -> Tensor | None:
        """Positions `[batch, keys]` in the whole text of what layers of `stage` attend to; None where it is all of it."""
        if self.left is None and (self.old is None or stage not in self.old.slots):
            return None
        now = self.places()
        return torch.cat([self.before(stage), torch.where(now < 0, now, now + self.past)], dim=1)

    def places(self) -> Tensor:
        """`left`, also where all are left."""
        if self.left is not None:
            return self.left
        return torch.arange(self.real.shape[1], device=self.real.device).expand(len(self.real), -1)

    def texts(self, places: Tensor) -> Tensor:
        """Which `places` `[batch, n]` of the whole text are neither fillers nor padding."""
        real = places >= 0
        return real if self.call.mask is None else real & _take(self.call.mask, places).bool()

    def dropped(self, stage: int) -> Tensor | int:
        """How many tokens of each row were dropped before those of this forward, `[batch, 1]`."""
        if self.old is None or stage not in self.old.slots:
            return 0
        all_ = torch.arange(self.old.covered, device=self.real.device).expand(len(self.real), -1)
        slots = self.old.slots[stage].expand(len(self.real), -1)
        return self.texts(all_).sum(1, keepdim=True) - self.texts(slots).sum(1, keepdim=True)

    def queries(self) -> Tensor:
        """`[batch, tokens]`: the last token of the prompt, or with labels the token before each answer."""
        if self.call.labels is not None:
            answer = self.call.labels != -100
            first = torch.zeros_like(answer)
            first[:, :-1] = answer[:, 1:] & ~answer[:, :-1]
            return first
        places = torch.arange(self.real.shape[1], device=self.real.device)
        last = torch.where(self.real, places, -1).amax(1, keepdim=True)
        asked = max(0, len(places) - (self.call.tail or 1))
        return places == torch.where(self.real[:, asked : asked + 1], last.clamp_max(asked), last)

    def kept(self, schedule: dict[int, float]) -> _Kept | None:
        """What the KV cache holds after this forward."""
        slots = {}
        for stage, left in self.stages.items():
            self.left = left
            keys = self.keys(stage)
            if keys is not None:
                slots[stage] = keys
        plain = (self.call.mask is None or bool(self.call.mask.all())) and all(
            bool((x >= 0).all()) for x in slots.values()
        )
        return _Kept(schedule, slots, self.past + self.real.shape[1], plain) if slots else None


def _left_filled(keep: Tensor) -> Tensor:
    """Indices of the true entries of each row, ascending, filled on the left with -1 to the longest row."""
    index = torch.where(keep, torch.arange(keep.shape[1], device=keep.device), -1).sort(dim=1).values
    return index[:, keep.shape[1] - int(keep.sum(1).max()) :]


def _take(x: Tensor, index: Tensor) -> Tensor:
    """`x` `[batch or 1, tokens, ...]` at `index` `[batch, n]`."""
    index = index.to(x.device)
    rows = torch.arange(len(index), device=x.device).unsqueeze(1)
    return x.expand(len(index), *x.shape[1:])[rows, index.clamp_min(0)]


class VisualStream:
    """The hooks of one model. `schedule` is layer -> share of the visual tokens that it and the layers after it see."""

    def __init__(
        self, model: PreTrainedModel, schedule: dict[int, float], scorer: Scorer, min_tokens: int, compact: bool
    ):
        self.schedule, self.scorer, self.min_tokens, self.compact = schedule, scorer, min_tokens, compact
        self.tokens = visual_token_ids(model)
        self.embed: Any = model.get_input_embeddings()
        decoder: Any = model.get_decoder()
        self.rotary = getattr(decoder, "rotary_emb", None)
        self.sliding = "sliding_attention" in layer_kinds(decoder.config)
        self.handles = [
            model.register_forward_pre_hook(self._enter, with_kwargs=True),
            model.register_forward_hook(self._leave, always_call=True),
            decoder.register_forward_pre_hook(self._begin, with_kwargs=True),
            decoder.register_forward_hook(self._end, with_kwargs=True),
        ]
        for index, layer in enumerate(decoder.layers):
            self.handles.append(layer.register_forward_pre_hook(partial(self._layer, index), with_kwargs=True))

    @staticmethod
    def of(model: nn.Module) -> VisualStream | None:
        """The hooks on `model`, if it has any."""
        owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
        return next((owner for owner in owners if isinstance(owner, VisualStream)), None)

    def remove(self) -> None:
        """Takes every hook off."""
        for handle in self.handles:
            handle.remove()

    @_uncompiled
    def _enter(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        call = _Call(self, _running.get())
        _running.set(call)
        if args:
            kwargs = {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}
        ids, embeds, tail = (kwargs.get(name) for name in ("input_ids", "inputs_embeds", "logits_to_keep"))
        call.labels, call.mask = kwargs.get("labels"), kwargs.get("attention_mask")
        call.tail = tail if isinstance(tail, int) else 0
        given = embeds if ids is None else ids
        if given is None or given.shape[1] == 1:
            return
        known = torch.tensor(self.tokens, device=given.device)
        if ids is not None:
            visual = torch.isin(ids, known)
        else:
            visual = torch.stack([(embeds == self.embed(token)).all(-1) for token in known]).any(0)
        call.visual = visual if bool(visual.any()) else None

    @_uncompiled
    def _leave(self, model: nn.Module, args: Any, output: Any) -> None:
        call = _running.get()
        if call is not None and call.owner is self:
            _running.set(call.outer)

    @_uncompiled
    def _begin(self, decoder: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        call, cache = _running.get(), kwargs.get("past_key_values")
        if call is None or call.owner is not self:
            raise EffllmError(
                "PyramidDrop sees images and labels in the call of the whole model, and it was not called itself: call it, "
                "not its inner model or its forward (PEFT before 0.21 does that: update it)"
            )
        old: _Kept | None = getattr(cache, KEY, None)
        if call.visual is None and old is None:
            return None
        batch, length = kwargs["inputs_embeds"].shape[:2]
        past = cache.get_seq_length() if cache is not None else 0
        if cache is not None and old is not None and past < old.covered:
            old = old.cut(past) if past else None
            setattr(cache, KEY, old)
        form = ALL_MASK_ATTENTION_FUNCTIONS.get(decoder.config._attn_implementation)
        simple = form is not eager_mask and not self.sliding and not self.compact
        if call.visual is None and (old is None or (length == 1 and old.plain and simple)):
            return None
        self._refuse(call, cache, form, kwargs, past + length)
        device = kwargs["inputs_embeds"].device
        for name in ("visual", "labels", "mask"):
            setattr(call, name, send_to_device(getattr(call, name), device))
        real = torch.ones(batch, length, dtype=torch.bool, device=device)
        if call.mask is not None:
            real = call.mask[:, -length:].bool()
        if old is not None and length > 1 and old.plain:
            old.plain = bool(real.all())
        counts = call.visual.sum(1).tolist() if call.visual is not None else []
        return args, {**kwargs, KEY: Stream(call, real, past, old, counts, form)}

    def _refuse(self, call: _Call, cache: Any, form: Any, kwargs: dict[str, Any], total: int) -> None:
        old: _Kept | None = getattr(cache, KEY, None)
        positions = kwargs.get("position_ids")
        if positions is not None and positions.dim() == 3:
            positions = positions[0] if len(positions) == 4 else None
        packed = call.mask is None and positions is not None and bool((positions.diff(dim=-1) != 1).any())
        packed = packed or any(kwargs.get(key) is not None for key in PACKED)
        flat = call.mask is None or (
            isinstance(call.mask, Tensor) and call.mask.dim() == 2 and call.mask.shape[1] == total
        )
        static = getattr(cache, "is_compileable", False)
        reasons = (
            (static, "shortens the KV cache of later layers, and a static cache has one length: use the dynamic cache"),
            (packed, "cannot tell the texts of a packed sequence apart: pass them as a padded batch"),
            (not flat, "must know which tokens are padding: pass attention_mask as [batch, tokens so far]"),
            (old is not None and old.schedule != self.schedule, "has another schedule than when the KV cache was filled: "
             "start again from an empty one"),
            (form not in (eager_mask, sdpa_mask, flash_attention_mask), "fits the masks of eager, sdpa and flash attention: "
             "choose one with model.set_attn_implementation"),
            (form is flash_attention_mask and self.sliding, "cannot tell flash attention how far apart the tokens that are "
             "left were, which a sliding window must know: use model.set_attn_implementation('sdpa')"),
        )  # fmt: skip
        for holds, reason in reasons:
            if holds:
                raise EffllmError(f"PyramidDrop {reason}")

    @_uncompiled
    def _layer(self, index: int, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if KEY not in kwargs:
            return None
        stream: Stream = kwargs.pop(KEY)
        if stream.call.visual is not None and not _known(layer, args, kwargs, stream.real.shape[1]):
            raise EffllmError(f"PyramidDrop does not know the arguments with which {type(layer).__name__} is called")
        hidden = args[0]
        if index in self.schedule:
            if stream.call.visual is not None:
                hidden = self._drop(stream, index, layer, hidden, self._fit(stream, kwargs, hidden))
            stream.stage += 1
            stream.stages[stream.stage] = stream.left
        stream.lefts.append(stream.left)
        stream.previous = hidden if index + 1 in self.schedule else None
        return (hidden,), self._fit(stream, kwargs, hidden)

    def _fit(self, stream: Stream, kwargs: dict[str, Any], hidden: Tensor) -> dict[str, Any]:
        """The layer's arguments for the tokens that are left."""
        keys = stream.keys(stream.stage) if stream.stage else None
        if keys is None:
            return kwargs
        fitted = dict(kwargs)
        fitted["attention_mask"] = self._memo(
            stream, "mask", kwargs["attention_mask"], partial(self._mask, stream, keys)
        )
        if (self.compact or stream.left is not None) and kwargs["position_embeddings"] is not None:
            rotary = partial(self._rotary, stream, kwargs, hidden)
            fitted["position_embeddings"] = self._memo(stream, "rotary", kwargs["position_embeddings"], rotary)
        if stream.left is not None:
            fitted["position_ids"] = None  # with gaps, flash attention would take them for packed texts
        return fitted

    @staticmethod
    def _memo(stream: Stream, kind: str, value: Any, make: Callable[[Any], Any]) -> Any:
        key = (stream.stage, kind, id(value))
        if key not in stream.memo:
            stream.memo[key] = make(value)
        return stream.memo[key]

    def _mask(self, stream: Stream, keys: Tensor, mask: Tensor | None) -> Tensor | None:
        """The layer's mask for the keys and queries that are left; None stays None where no key is a filler."""
        length, rows = stream.real.shape[1], stream.places()
        if mask is None:
            if bool((keys >= 0).all()):
                return None
            if stream.form is flash_attention_mask:
                return keys >= 0
            queries = torch.where(rows < 0, rows, rows + stream.past)
            seen = (keys.unsqueeze(1) <= queries.unsqueeze(2)) & (keys >= 0).unsqueeze(1)
            return _open(seen.unsqueeze(1), rows, keys)
        offset = stream.past + length - mask.shape[-1]  # a sliding cache holds the last keys only
        columns = torch.where(keys < offset, -1, keys - offset)
        if mask.dim() == 2:
            return _take(mask, columns).masked_fill(columns < 0, 0)
        columns = columns[:, max(0, columns.shape[1] - mask.shape[-1]) :]
        batch = torch.arange(len(rows), device=rows.device)[:, None, None]
        mask = mask.expand(len(rows), *mask.shape[1:])[:, 0]
        taken = mask[batch, rows.clamp_min(0).unsqueeze(2), columns.clamp_min(0).unsqueeze(1)]
        return _open(taken.unsqueeze(1), rows, columns)

    def _rotary(self, stream: Stream, kwargs: dict[str, Any], hidden: Tensor, embeddings: Any) -> Any:
        """Rotary embeddings of the tokens that are left: at their own positions, or (compact) numbered anew."""
        if not self.compact:
            return tuple(_take(table, stream.places()) for table in embeddings)
        positions = kwargs["position_ids"].expand(len(stream.real), -1)
        dropped = stream.dropped(stream.stage)
        if stream.left is not None:
            kept = stream.left >= 0
            before = stream.real.long().cumsum(1) - stream.real.long()
            dropped = dropped + _take(before, stream.left) - (kept.long().cumsum(1) - kept.long())
            positions = _take(positions, stream.left)
        return self.rotary(hidden, (positions - dropped).clamp_min(0))  # type: ignore[misc]

    def _drop(self, stream: Stream, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Ranks the visual tokens that are left, and keeps this layer's share of them."""
        left, flags = stream.places(), (stream.call.visual, stream.real, stream.queries())
        visual, real, queries = (_take(flag, left) & (left >= 0) for flag in flags)  # type: ignore[arg-type]
        asked = (queries & ~visual).any(1, keepdim=True) & ~(queries & visual).any(1, keepdim=True)
        with torch.no_grad():
            scores = self.scorer(self._ranking(stream, layer, hidden, (visual, queries, real), kwargs)).to(
                visual.device
            )
        order = scores.float().masked_fill(~visual, -torch.inf).argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        share = [max(self.min_tokens, int(count * self.schedule[index])) for count in stream.counts]
        few = rank < torch.tensor(share, device=rank.device).unsqueeze(1)
        keep = torch.where(visual, few | ~asked, real)
        if bool((keep | ~visual).all()):
            return hidden
        local = _left_filled(keep)
        stream.left = torch.where(local < 0, local, _take(left, local))
        return _take(hidden, local)

    @staticmethod
    def _ranking(stream: Stream, layer: nn.Module, hidden: Tensor, flags: Any, kwargs: dict[str, Any]) -> Ranking:
        """What the scorer sees, on the device of the layer (which may be another one than that of the layer before)."""
        device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
        if device is None:
            own = next(layer.parameters()).device
            device = hidden.device if own.type == "meta" else own
        moved = {"attention_mask": kwargs["attention_mask"], "position_embeddings": kwargs["position_embeddings"]}
        assert stream.previous is not None
        tensors = (hidden.detach(), stream.previous.detach(), *flags, stream.texts(stream.before(stream.stage + 1)))
        given = (*send_to_device(tensors, device), {**kwargs, **send_to_device(moved, device)})
        return Ranking(layer, *given)

    @_uncompiled
    def _end(self, decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        stream: Stream | None = kwargs.get(KEY)
        if stream is None:
            return
        if not stream.lefts:
            raise EffllmError(f"{type(decoder).__name__} does not hand its keyword arguments on to its layers")
        length, lefts = stream.real.shape[1], [None, *stream.lefts]
        output["last_hidden_state"] = _spread(output["last_hidden_state"], lefts[-1], length)
        if output.get("hidden_states") is not None:
            spread = [_spread(value, left, length) for value, left in zip(output["hidden_states"], lefts, strict=True)]
            output["hidden_states"] = tuple(spread)
        cache = kwargs.get("past_key_values")
        cache = output.get("past_key_values") if cache is None else cache
        if isinstance(cache, Cache) and stream.call.visual is not None:
            setattr(cache, KEY, stream.kept(self.schedule))


def _known(layer: nn.Module, args: Any, kwargs: dict[str, Any], length: int) -> bool:
    """Whether a layer is called as all are here, and given nothing else for each token that it would miss when some go."""
    tables, fitted = kwargs.get("position_embeddings", ()), ("attention_mask", "position_ids")
    others = [key for key, value in kwargs.items() if isinstance(value, Tensor) and length in value.shape[1:]]
    named = inspect.signature(type(layer).forward).parameters if others else {}
    rotary = tables is None or (isinstance(tables, tuple) and [table.dim() for table in tables] == [3, 3])
    return len(args) == 1 and "attention_mask" in kwargs and rotary and {*others} & {*named} <= {*fitted}


def _open(mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Closes the columns of fillers, and lets each filler see itself so that no row is empty."""
    closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    mask = mask.masked_fill((columns < 0)[:, None, None, :], closed)
    own = torch.arange(columns.shape[1], device=rows.device)
    own = own == own[columns.shape[1] - rows.shape[1] :].unsqueeze(1)
    return mask.masked_fill(((rows < 0).unsqueeze(-1) & own).unsqueeze(1), mask.dtype == torch.bool)


def _spread(hidden: Tensor | None, left: Tensor | None, length: int) -> Tensor | None:
    """Hidden states at every position again: a dropped one has those of the last kept one before it."""
    if hidden is None or left is None:
        return hidden
    places = torch.arange(length, device=left.device).expand(len(left), -1).contiguous()
    return _take(hidden, torch.searchsorted(left.contiguous(), places, right=True) - 1)


def layer_kinds(text: Any) -> list[str]:
    """Full, sliding, ... attention of each layer of a text config."""
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"]
        kinds *= getattr(text, "num_hidden_layers", 0)
    return list(kinds)


def visual_token_ids(model: PreTrainedModel) -> list[int]:
    """The ids that stand for images and videos in a prompt; none where the model has no such tokens."""
    names = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
    found = {getattr(model.config, name, None) for name in names}
    return sorted(token for token in found if isinstance(token, int) and token >= 0)
