"""The wheel holds everything that an installed effllm reads."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from pages import ROOT


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_package(tmp_path: Path) -> None:
    """Builds the wheel (pip fetches the build backend) and compares it with the files that git knows."""
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("effllm-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(
        ["git", "ls-files", "effllm"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert set(tracked) <= held
    for name in (
        "effllm/aliases.yaml",
        "effllm/py.typed",
        "effllm/demo/model.safetensors",
        "effllm/demo/tokenizer.json",
        "effllm/demo/calibration.txt",
        "effllm/demo/evaluation.txt",
        "effllm/measure/result.schema.json",
        "effllm/presets/layerwise-4bit.yaml",
    ):
        assert name in held
    assert not [name for name in held if name.startswith(("tests/", "docs/"))]
    assert wheel.stat().st_size < 14_000_000
