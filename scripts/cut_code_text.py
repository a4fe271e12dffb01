"""Cuts `effllm/demo/code.txt`, the part of the default calibration text that is no prose: effllm's code and documentation.

    python scripts/cut_code_text.py

Passages of both take turns, so that windows spread over the file see both. It is cut once in a while, not with every change:
what is calibrated on it changes with it.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parent.parent
PASSAGES = 8  # of code, and as many of documentation
LENGTH = 12_000  # characters of each


def passages(files: list[Path]) -> list[str]:
    """Passages spread evenly over `files`, each from the beginning of a line."""
    text = "\n\n".join(file.read_text(encoding="utf-8").strip() for file in files)
    starts = [text.index("\n", number * (len(text) - LENGTH) // PASSAGES) + 1 for number in range(PASSAGES)]
    return [text[start : start + LENGTH] for start in starts]


code = passages(sorted((ROOT / "effllm").rglob("*.py")))
pages = passages([ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
turns = [passage for pair in zip(code, pages, strict=True) for passage in pair]
(ROOT / "effllm" / "demo" / "code.txt").write_text("\n\n".join(turns) + "\n", encoding="utf-8")
