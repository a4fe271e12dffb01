"""The documentation is true: its Python blocks and its commands run, its plans load, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
import yaml
from pages import PAGES, ROOT, Block, blocks, write_files

import effllm
import effllm.measure.evaluate
from effllm.checkpoint import resolve
from effllm.cli import app, main
from effllm.data.text import packaged_text
from effllm.plans import load_plan


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs an `effllm` command in this process."""
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code in (0, None), command


def parse(command: str) -> None:
    """Checks that an `effllm` command names a known subcommand and known options."""
    group: Any = typer.main.get_command(app)
    _, name, *rest = shlex.split(command)
    assert name in group.commands, command
    group.commands[name].make_context(name, rest)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the pages take as given: a model folder, a text, and the demo model compressed by the default plan.

    Speed and memory are measured in a fresh process once; the other runs of these tests take the same figures.
    """
    folder = tmp_path_factory.mktemp("stage")
    shutil.copytree(resolve("demo"), folder / "my-model")
    shutil.copy(packaged_text("evaluation.txt"), folder / "my-text.txt")
    measure_run = effllm.measure.evaluate.measure_run
    figures: list[dict[str, Any]] = []

    def measure_once(*arguments: Any) -> dict[str, Any]:
        figures.extend([] if figures else [measure_run(*arguments)])
        return figures[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(effllm.measure.evaluate, "measure_run", measure_once)
        patch.chdir(folder)
        run("effllm compress demo --plan layerwise-4bit", patch)
        yield folder


def run_block(block: Block, where: str, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if block.language == "yaml":
        load_plan(yaml.safe_load(block.text))
    elif block.language == "python" and block.file is None:
        exec(compile("\n" * (block.line - 1) + block.text, where, "exec"), names)
    elif block.language == "bash":
        for command in block.commands():
            words = shlex.split(command)
            if words[0] == "effllm":
                parse(command)
                if block.not_run is None:
                    run(command, monkeypatch)
            elif words[0] == "bash":
                assert command in (ROOT / ".ci" / "run").read_text().splitlines(), f"CI does not run {command!r}"
            else:
                assert block.not_run, f"{where}:{block.line}: {command!r} is not run, and no comment says why"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page: Path, stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for item in stage.iterdir():
        (shutil.copytree if item.is_dir() else shutil.copy)(item, tmp_path / item.name)
    write_files(page, tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    threads = torch.get_num_threads()
    try:
        for block in blocks(page):
            run_block(block, str(page), names, monkeypatch)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    missing = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "index.md" and page.name not in index]
    assert not missing


def test_every_preset_and_method_is_documented() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    from effllm.plans import presets

    assert not [name for name in (*presets(), *effllm.methods()) if f"`{name}`" not in text]
