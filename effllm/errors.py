"""Failures that their message explains."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EffllmError(Exception):
    """What failed, with which value, and what would work. The command line prints it in one line and exits with 1."""


class UsageError(EffllmError):
    """The call itself is wrong: an unknown key, method or plan, a pattern that matches nothing. Exit status 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown `name`: the nearest known name, or the list of all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
