"""The picture in docs/architecture.md is true: every part is in it, and imports only from layers below."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from pages import ROOT

PACKAGE = ROOT / "effllm"
NOT_PARTS = {"__init__", "demo", "presets"}


def layers() -> dict[str, int]:
    """Part -> its layer, 0 the highest."""
    picture = re.search(r"```text\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.S)
    assert picture is not None
    lines = [re.split(r" {2,}", line)[0].split() for line in picture[1].splitlines()]
    found = {part: number for number, parts in enumerate(lines) for part in parts}
    assert len(found) == sum(map(len, lines)), "a part stands in one layer"
    return found


def part_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


def imported(file: Path) -> set[str]:
    """The parts that a file imports when it is imported itself."""
    found = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "effllm":
            names = [f"effllm.{name.name}" for name in node.names] if node.module == "effllm" else [str(node.module)]
            found |= {part_of(name) for name in names}
        elif isinstance(node, ast.Import):
            found |= {part_of(name.name) for name in node.names if name.name.split(".")[0] == "effllm"}
    return found


def test_every_part_is_in_the_picture():
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert layers().keys() == parts - NOT_PARTS


def test_imports_go_down():
    place = layers()
    for file in sorted(PACKAGE.rglob("*.py")):
        own = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for part in imported(file) - {own, "__init__"} if own in place else ():
            assert place[part] > place[own], f"{file.relative_to(ROOT)} imports {part}, which is not below {own}"


def test_the_core_stays_small():
    sizes = {file: len(file.read_text().splitlines()) for file in PACKAGE.rglob("*.py")}
    assert max(sizes.values()) < 400, "a file has one idea and fits in a head"
    assert sum(lines for file, lines in sizes.items() if file.parent == PACKAGE) < 3000
