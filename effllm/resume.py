"""The journal of an unfinished folder: what survives a crash, so that the same command goes on where it stopped."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effllm.errors import EffllmError

JOURNAL = "journal.jsonl"


def run_key(**facts: Any) -> str:
    """What tells a run, or a result that is kept, from any other: SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


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
