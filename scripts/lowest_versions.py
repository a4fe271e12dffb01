#!/usr/bin/env python3
"""Proves the lower bounds in pyproject.toml: installs exactly those versions and runs the tests with them.

    python3 scripts/lowest_versions.py [PYTEST ARGUMENTS]

Makes a temporary environment with every `name>=version` of the dependencies, of the extra `datasets`, and of what the
tests import, as `name==version`; everything else is whatever pip then chooses. Takes some minutes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_IMPORTED = ("ruff", "mypy", "types-PyYAML", "types-psutil")


def pins() -> dict[str, str]:
    """Package -> its lower bound."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    found = {}
    for line in [*project["dependencies"], *extras["datasets"], *extras["dev"]]:
        name, _, version = re.fullmatch(r"([\w-]+)((?:[>=]=)([\w.]+))?", line).groups()
        if name not in NOT_IMPORTED:
            if version is None:
                sys.exit(f"{line} has no lower bound")
            found[name] = version
    return found


def main() -> None:
    lowest = pins()
    print("lower bounds:", ", ".join(f"{name} {version}" for name, version in lowest.items()), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder, "bin", "python"))
        subprocess.run(["bash", ROOT / "scripts" / "install_torch", python, lowest["torch"]], check=True)
        wanted = [f"{name}=={version}" for name, version in lowest.items()]
        install = [python, "-m", "pip", "install", "-qq"]
        subprocess.run([*install, *wanted], check=True)
        subprocess.run([*install, "--no-deps", "--editable", ROOT], check=True)
        subprocess.run([python, "-m", "pip", "check"], check=True)
        subprocess.run(
            [python, "-c", "import datasets, datasets.exceptions; datasets.exceptions.DatasetsError"], check=True
        )
        arguments = sys.argv[1:] or ["--ignore", "tests/test_docs.py"]
        done = subprocess.run([python, "-m", "pytest", "-p", "no:cacheprovider", *arguments], cwd=ROOT, check=False)
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
