"""`effllm autoload`: registers effllm in every Python process of this environment, by a `.pth` file of one line.

Python's `site` module runs the line at the start of an interpreter: the code of `startup/effllm_startup.py`, which
imports nothing until transformers or peft is imported, and then nothing where effllm is gone.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

from effllm.errors import EffllmError
from effllm.integrations.run import STARTUP

NAME = "effllm_autoload.pth"
MARK = "# effllm autoload"
CODE = (STARTUP / "effllm_startup.py").read_text(encoding="utf-8")
LINE = f"import sys; exec({CODE!r}, {{}})  {MARK} (off: effllm autoload off)\n"


def path() -> Path:
    """Where the file is, or would be."""
    return Path(sysconfig.get_path("purelib")) / NAME


def turn_on() -> str:
    """Writes the file; returns what was done.

    Raises:
        EffllmError: the file there is not ours, or the folder cannot be written.
    """
    file, found = path(), _read()
    if found == LINE:
        return f"already on: {file}"
    scratch = file.with_suffix(".tmp")
    try:
        scratch.write_text(LINE, encoding="utf-8")
        scratch.replace(file)
    except OSError as error:
        raise _cannot("write", file, error) from None
    return f"on: {file} replaced, it was another version's" if found else f"on: {file}"


def turn_off() -> str:
    """Removes the file; returns what was done.

    Raises:
        EffllmError: the file there is not ours, or cannot be removed.
    """
    file = path()
    if _read() is None:
        return "off: there was no file"
    try:
        file.unlink()
    except OSError as error:
        raise _cannot("remove", file, error) from None
    return f"off: {file} removed"


def status() -> str:
    """Whether the file is there, and where.

    Raises:
        EffllmError: the file there is not ours.
    """
    found = _read()
    if found is None:
        return "off"
    return f"on: {path()}" + ("" if found == LINE else " (another version's: effllm autoload on replaces it)")


def _read() -> str | None:
    """The file's content; None where there is none."""
    file = path()
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _cannot("read", file, error) from None
    if MARK not in text:
        raise EffllmError(f"effllm did not write {file}, so it stays as it is; move it, or use effllm run")
    return text


def _cannot(verb: str, file: Path, error: OSError) -> EffllmError:
    return EffllmError(
        f"cannot {verb} {file} ({error.strerror}); do it as the environment's owner, or use effllm run -- COMMAND"
    )
