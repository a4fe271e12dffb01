"""The worked example of CONTRIBUTING.md: installed as a package of its own, it is a method that keeps the contract."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from pages import ROOT, write_files

PAGE = ROOT / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which the example package is installed: its files, and the metadata that pip would write."""
    folder = tmp_path_factory.mktemp("site-packages")
    write_files(PAGE, folder)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    metadata = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    points = "\n".join(
        f"[{group}]\n" + "\n".join(f"{name} = {value}" for name, value in members.items())
        for group, members in project["entry-points"].items()
    )
    (metadata / "entry_points.txt").write_text(points + "\n")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}


def test_it_is_listed_and_compresses(installed: dict[str, str], tmp_path: Path) -> None:
    def effllm(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "effllm.cli", *arguments],
            env=installed,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "The sign of every weight" in effllm("methods", "onebit")
    effllm(
        "compress", "demo", "--plan", "uniform-8bit", "--set", "*.up_proj=onebit:group_size=32", "--out", "demo-onebit"
    )
    assert '"onebit"' in (tmp_path / "demo-onebit" / "config.json").read_text()


def test_it_keeps_the_contract(installed: dict[str, str]) -> None:
    files = ["tests/test_methods.py", "tests/test_families.py", "tests/test_edits.py"]
    command = [sys.executable, "-m", "pytest", *files, "-k", "onebit", "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=installed, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 5, done.stdout
