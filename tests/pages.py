"""Reads the documentation: its fenced blocks, and what a comment before each says about running it.

`<!-- file: NAME -->` before a block: it is the file NAME of the page's folder. `<!-- not run: REASON -->`: its commands
are only checked to parse.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(?:<!-- (file|not run): ([^\n]+) -->\n)?```(\w*)\n(.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    language: str
    text: str
    line: int
    """Of its first line in the page."""
    file: str | None = None
    not_run: str | None = None

    def commands(self) -> list[str]:
        """The commands of a bash block, continued lines joined, comments left out."""
        lines = self.text.replace("\\\n", " ").splitlines()
        stripped = (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines)
        return [line for line in stripped if line]


def blocks(page: Path) -> list[Block]:
    """Every fenced block of `page`, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        kind, value, language, body = match.groups()
        line = text.count("\n", 0, match.start(4)) + 1
        found.append(Block(language, body, line, **({kind.replace(" ", "_"): value} if kind else {})))
    return found


def write_files(page: Path, folder: Path) -> list[Path]:
    """Writes the blocks that are files into `folder`."""
    written = []
    for block in blocks(page):
        if block.file is not None:
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
            written.append(path)
    return written
