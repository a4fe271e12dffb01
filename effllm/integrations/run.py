"""`effllm run`: any command, with effllm registered in every Python process that it starts."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from effllm.errors import EffllmError, UsageError

STARTUP = Path(__file__).with_name("startup")
"""The folder that goes on PYTHONPATH: its `sitecustomize.py` is imported by every interpreter at its start."""


def environment() -> dict[str, str]:
    """This process' environment, with `STARTUP` first on PYTHONPATH."""
    paths = [str(STARTUP), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run(command: Sequence[str]) -> NoReturn:
    """Becomes `command`, whose exit status is then this process'.

    Raises:
        UsageError: there is no such command.
        EffllmError: the system cannot run it.
    """
    if shutil.which(command[0]) is None:
        raise UsageError(f"there is no command {command[0]!r} on PATH; give its path, or activate its environment")
    sys.stdout.flush()
    try:
        os.execvpe(command[0], list(command), environment())
    except OSError as error:
        raise EffllmError(f"cannot run {command[0]!r}: {error.strerror}") from None
