"""Visual tokens that leave a decoder between its layers: the hooks that drop them, and what makes the rest of a model agree.

Nothing of a model's code is replaced. A hook on the model notes where its visual tokens are; one on the decoder puts a
`Stream` into the keyword arguments that reach every layer, so that state travels with the call; one on each layer takes it
out again, drops tokens where the schedule says so, and fits the layer's mask and rotary embeddings to those that are left.
After the last layer every position is filled again, a dropped one by the last kept one before it, so that logits, labels
and losses keep their shapes. What was kept is noted on the KV cache, which is all that decoding and later turns need.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar, cast

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, flash_attention_mask, sdpa_mask

from effllm.errors import EffllmError
from effllm.methods.pyramiddrop.ranking import Ranking, Scorer, kv_cache, left_filled, take
from effllm.methods.pyramiddrop.stream import Call, Kept, Stream

KEY = "effllm_visual_stream"
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")
_running: ContextVar[Call | None] = ContextVar("effllm_visual_call", default=None)


_Hook = TypeVar("_Hook", bound=Callable[..., Any])


def _uncompiled(hook: _Hook) -> _Hook:
    """Keeps torch.compile from tracing a hook, whose results depend on values."""
    return cast(_Hook, torch.compiler.disable(hook))


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
        call = Call(self, _running.get())
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
        call, cache = _running.get(), kv_cache(kwargs)
        if call is None or call.owner is not self:
            raise EffllmError(
                "PyramidDrop sees images and labels in the call of the whole model, and it was not called itself: call it, "
                "not its inner model or its forward (PEFT before 0.21 does that: update it)"
            )
        old: Kept | None = getattr(cache, KEY, None)
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

    def _refuse(self, call: Call, cache: Any, form: Any, kwargs: dict[str, Any], total: int) -> None:
        old: Kept | None = getattr(cache, KEY, None)
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
        keys = self._memo(stream, "keys", None, lambda _: stream.keys(stream.stage)) if stream.stage else None
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
            return take(mask, columns).masked_fill(columns < 0, 0)
        columns = columns[:, max(0, columns.shape[1] - mask.shape[-1]) :]
        batch = torch.arange(len(rows), device=rows.device)[:, None, None]
        mask = mask.expand(len(rows), *mask.shape[1:])[:, 0]
        taken = mask[batch, rows.clamp_min(0).unsqueeze(2), columns.clamp_min(0).unsqueeze(1)]
        return _open(taken.unsqueeze(1), rows, columns)

    def _rotary(self, stream: Stream, kwargs: dict[str, Any], hidden: Tensor, embeddings: Any) -> Any:
        """Rotary embeddings of the tokens that are left: at their own positions, or (compact) numbered anew."""
        if not self.compact:
            return tuple(take(table, stream.places()) for table in embeddings)
        positions = kwargs["position_ids"].expand(len(stream.real), -1)
        dropped = stream.dropped(stream.stage)
        if stream.left is not None:
            kept = stream.left >= 0
            before = stream.real.long().cumsum(1) - stream.real.long()
            dropped = dropped + take(before, stream.left) - (kept.long().cumsum(1) - kept.long())
            positions = take(positions, stream.left)
        return self.rotary(hidden, (positions - dropped).clamp_min(0))  # type: ignore[misc]

    def _drop(self, stream: Stream, index: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Ranks the visual tokens that are left, and keeps this layer's share of them."""
        left, flags = stream.places(), (stream.call.visual, stream.real, stream.queries())
        visual, real, queries = (take(flag, left) & (left >= 0) for flag in flags)  # type: ignore[arg-type]
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
        local = left_filled(keep)
        stream.left = torch.where(local < 0, local, take(left, local))
        return take(hidden, local)

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
        cache = kv_cache(kwargs)
        cache = kv_cache(output) if cache is None else cache
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
    if rows.shape[1] == 1:  # a single token is no filler
        return mask
    own = torch.arange(columns.shape[1], device=rows.device)
    own = own == own[columns.shape[1] - rows.shape[1] :].unsqueeze(1)
    return mask.masked_fill(((rows < 0).unsqueeze(-1) & own).unsqueeze(1), mask.dtype == torch.bool)


def _spread(hidden: Tensor | None, left: Tensor | None, length: int) -> Tensor | None:
    """Hidden states at every position again: a dropped one has those of the last kept one before it."""
    if hidden is None or left is None:
        return hidden
    places = torch.arange(length, device=left.device).expand(len(left), -1).contiguous()
    return take(hidden, torch.searchsorted(left.contiguous(), places, right=True) - 1)


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
