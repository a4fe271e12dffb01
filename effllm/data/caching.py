"""Where effllm keeps what took long to find."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """A folder in `$EFFLLM_CACHE`, or in `effllm` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("EFFLLM_CACHE") or Path(base) / "effllm") / kind
