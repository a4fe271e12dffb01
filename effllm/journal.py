"""What was done to a model, written down: the record that a finished folder carries, and the one that survives a crash."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from effllm.errors import EffllmError, UsageError
from effllm.method import Codec, Edit, from_spec
from effllm.site import Site

Entries = list[dict[str, Any]]
ENTRY = {"method": str, "settings": dict, "sites": list}
JOURNAL = "journal.jsonl"
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


class RunJournal:
    """`journal.jsonl` of an unfinished output folder: one line a finished unit, so that a killed run resumes.

    Several processes may share the folder: a unit is claimed by a lock that the kernel drops when its owner dies.
    """

    def __init__(self, folder: Path, key: str):
        self.folder, self.path = folder, folder / JOURNAL
        _refuse_foreign(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with self.claim("journal"):
            lines = self._lines() if self.path.exists() else []
            if lines and lines[0].get("key") != key:
                raise EffllmError(
                    f"{folder} is an unfinished run of another model, plan, thread count or version; "
                    "finish it with its own command, or pass --overwrite"
                )
            if not lines:
                self._append({"key": key})

    def _lines(self) -> list[dict[str, Any]]:
        lines = []
        for raw in self.path.read_bytes().split(b"\n"):
            with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):  # a line torn by a crash
                line = json.loads(raw)
                if isinstance(line, dict):
                    lines.append(line)
        return lines

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("ab") as stream:
            stream.write(b"\n" + json.dumps(line).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def add(self, kind: str, name: str, **facts: Any) -> None:
        """Records that `kind` `name` is finished, with what a resumed run needs to know."""
        self._append({"kind": kind, "name": name, **facts})

    def find(self, kind: str, name: str) -> dict[str, Any] | None:
        """What `add` recorded, or None. A recorded file that is gone or changed does not count."""
        for line in reversed(self._lines()):
            if line.get("kind") == kind and line.get("name") == name:
                file = line.get("file")
                return line if file is None or self._intact(self.folder / file, line["sha256"]) else None
        return None

    def all(self, kind: str) -> dict[str, dict[str, Any]]:
        """Every line of a kind by name, in the order in which they were added."""
        return {line["name"]: line for line in self._lines() if line.get("kind") == kind}

    @staticmethod
    def _intact(file: Path, digest: str) -> bool:
        return file.is_file() and file_digest(file) == digest

    @contextlib.contextmanager
    def claim(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Holds the lock `name`; yields False at once where another process has it and `wait` is off."""
        with (self.folder / f"{name}.lock").open("wb") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True

    def restart(self) -> None:
        """Forgets everything that was added."""
        key = self._lines()[0]
        self.path.unlink()
        self._append(key)

    def discard(self) -> None:
        """Deletes the folder if nothing in it is finished, so that it does not stand in another run's way."""
        with contextlib.suppress(FileNotFoundError):
            if len(self._lines()) < 2:
                shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def forget(folder: Path) -> None:
        """Deletes an unfinished output folder, if there is one."""
        _refuse_foreign(folder)
        if folder.exists():
            shutil.rmtree(folder)

    @staticmethod
    def remove(folder: Path) -> None:
        """Deletes the journal and the locks from a finished `folder`."""
        for file in [*folder.glob("*.lock"), folder / JOURNAL]:
            file.unlink(missing_ok=True)


def _refuse_foreign(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()) and not (folder / "journal.lock").exists():
        raise EffllmError(f"{folder} holds something that effllm did not write; move it, or choose another --out")


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
