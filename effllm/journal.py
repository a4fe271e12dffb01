"""What was done to a model, written down: the record that a finished folder carries in its config."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from effllm.errors import EffllmError, UsageError
from effllm.method import Codec, Edit
from effllm.registry import from_spec
from effllm.site import Site

Entries = list[dict[str, Any]]
ENTRY = {"method": str, "settings": dict, "sites": list}
RUN = r"\d{1,5}(?:-\d{1,5})?"
PATTERN = re.compile(rf"(?:[\w.]|\{{{RUN}(?:,{RUN})*\}})*")
NUMBER = re.compile(r"(?:(?<=\.)|^)(0|[1-9]\d*)(?=\.|$)")
MOST_SITES = 1_000_000  # of one pattern; a journal may come from a stranger


def entries(codecs: dict[str, Codec]) -> Entries:
    """The journal of `{site: codec}`: each distinct codec once, with patterns that name its sites.

    A pattern is a module path in which `{...}` may stand for numbers, of blocks and of experts:
    `model.layers.{0-3,7}.mlp.experts.up_proj.{0-127}`; several stand for all combinations.
    """
    grouped: dict[Codec, list[str]] = {}
    for site, codec in codecs.items():
        grouped.setdefault(codec, []).append(site)
    return [
        {"method": codec.name(), "settings": codec.settings(), "sites": _fold(sites)}
        for codec, sites in grouped.items()
    ]


def shapes(sites: Iterable[Site], assigned: dict[str, Codec]) -> Entries:
    """`[rows, columns]` of every compressed matrix: each distinct shape once, with patterns as in `entries`.

    effllm knows them from the model's class; a reader without it needs them, for rows are padded to whole bytes.
    """
    grouped: dict[tuple[int, int], list[str]] = {}
    for site in sites:
        if site.name in assigned:
            grouped.setdefault(site.shape, []).append(site.name)
    return [{"shape": list(shape), "sites": _fold(names)} for shape, names in grouped.items()]


def codecs(journal: Entries) -> dict[str, Codec]:
    """The inverse of `entries`, in journal order. The journal may come from a stranger.

    Raises:
        EffllmError: an entry is malformed, names an unknown method or setting, or names a site twice.
    """
    found: dict[str, Codec] = {}
    for entry in journal:
        if not isinstance(entry, dict) or {k: type(v) for k, v in entry.items()} != ENTRY:
            raise EffllmError(f"a journal entry needs method, settings and sites, not {str(entry)[:200]}")
        codec: Codec = _method(entry, Codec)
        for pattern in entry["sites"]:
            for site in _unfold(pattern):
                if site in found:
                    raise EffllmError(f"the journal names site {site!r} twice")
                found[site] = codec
    return found


def edit_entries(edits: list[Edit]) -> Entries:
    """The form in which a folder's config names edits."""
    return [{"method": edit.name(), "settings": edit.settings()} for edit in edits]


def edits(entries: Entries) -> list[Edit]:
    """The edits that a folder's config names, `[{method, settings}]`; it may come from a stranger.

    Raises:
        EffllmError: an entry is malformed, or names an unknown edit or setting.
    """
    found = []
    for entry in entries:
        if not isinstance(entry, dict) or {k: type(v) for k, v in entry.items()} != {"method": str, "settings": dict}:
            raise EffllmError(f"an edit needs method and settings, not {str(entry)[:200]}")
        found.append(_method(entry, Edit))
    return found


def edits_in(config: dict[str, Any]) -> list[Edit]:
    """The edits that a `config.json` names; none where effllm did not write it."""
    ours = config.get("quantization_config") or {}
    return edits(ours.get("edits") or []) if ours.get("quant_method") == "effllm" else []


def restore_structure(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """`model`, as built from a `config.json`, with those edits on it that the config names and that change the structure."""
    attach_edits(model, edits_in(config), structure=True)
    return model


def attach_edits(model: nn.Module, edits: Iterable[Edit], structure: bool) -> None:
    """Attaches those of `edits` that change which weights there are, or those that do not."""
    for edit in edits:
        if edit.structure == structure:
            edit.attach(model)


def _method(entry: dict[str, Any], kind: type[Any]) -> Any:
    try:
        return from_spec({entry["method"]: entry["settings"]}, kind)
    except UsageError as error:
        raise EffllmError(
            f"the journal: {error}; upgrade effllm, or install the package that adds the method"
        ) from None


def _fold(sites: list[str]) -> list[str]:
    """Patterns for `sites`, in the order of their first sites."""
    numbers: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
    for site in sites:
        words = NUMBER.split(site)
        numbers.setdefault(tuple(words[::2]), []).append(tuple(int(word) for word in words[1::2]))
    return [
        "".join(text for pair in zip(words, (*ranges, ""), strict=True) for text in pair)
        for words, found in numbers.items()
        for ranges in _products(found)
    ]


def _products(found: list[tuple[int, ...]]) -> list[tuple[str, ...]]:
    """Tuples of numbers as few products of ranges: those that share all later ranges are joined at the first number."""
    if not found[0]:
        return [()]
    tails: dict[int, list[tuple[int, ...]]] = {}
    for first, *rest in found:
        tails.setdefault(first, []).append(tuple(rest))
    firsts: dict[tuple[tuple[str, ...], ...], list[int]] = {}
    for first, rests in tails.items():
        firsts.setdefault(tuple(_products(rests)), []).append(first)
    return [(_ranges(numbers), *tail) for later, numbers in firsts.items() for tail in later]


def _ranges(numbers: list[int]) -> str:
    runs = []
    for _, run in itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
        members = [number for _, number in run]
        runs.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return runs[0] if len(numbers) == 1 else "{" + ",".join(runs) + "}"


def _unfold(pattern: str) -> Iterator[str]:
    if not isinstance(pattern, str) or PATTERN.fullmatch(pattern) is None:
        raise EffllmError(f"the journal names sites by {pattern!r}, which is no module path")
    words = re.split(r"\{([^}]*)\}", pattern)
    numbers = []
    for word in words[1::2]:
        runs = [run.partition("-") for run in word.split(",")]
        numbers.append([n for first, _, last in runs for n in range(int(first), int(last or first) + 1)])
    if math.prod(len(choice) for choice in numbers) > MOST_SITES:
        raise EffllmError(f"the journal's pattern {pattern!r} stands for more than {MOST_SITES} sites")
    for choice in itertools.product(*numbers):
        yield "".join(str(text) for pair in zip(words[::2], (*choice, ""), strict=True) for text in pair)
