#!/usr/bin/env python3
"""What `effllm autoload` and `effllm run` add to the start of an interpreter.

    python scripts/startup_cost.py [RUNS]

Starts `python -c pass` in a temporary environment that sees this one's packages, in turn without effllm, with the line of
`autoload` and as under `run`, and prints the medians over RUNS (40) rounds. Then what registering adds to the import of
transformers' model classes.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

from effllm.integrations.autoload import LINE, NAME
from effllm.integrations.run import environment

REGISTERING = """
import time, transformers.modeling_utils
began = time.perf_counter()
import effllm.hf
print(time.perf_counter() - began)
"""


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    times: dict[str, list[float]] = {"without": [], "autoload": [], "run": []}
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, symlinks=True)
        packages = next(Path(folder).glob("lib/*/site-packages"))
        (packages / "libraries.pth").write_text(
            f"{sysconfig.get_path('purelib')}\n{Path(__file__).resolve().parents[1]}\n"
        )
        python = Path(folder, "bin", "python")
        for _ in range(runs + 2):
            for way, taken in times.items():
                if way == "autoload":
                    (packages / NAME).write_text(LINE)
                settings = environment() if way == "run" else dict(os.environ)
                began = time.perf_counter()
                subprocess.run([python, "-c", "pass"], env=settings, check=True)
                taken.append(1000 * (time.perf_counter() - began))
                (packages / NAME).unlink(missing_ok=True)
        medians = {way: statistics.median(taken[2:]) for way, taken in times.items()}
        for way, median in medians.items():
            print(f"{way}: {median:.2f} ms ({median - medians['without']:+.2f})")
        done = [
            subprocess.run([python, "-c", REGISTERING], capture_output=True, text=True, check=True) for _ in range(5)
        ]
        print(f"registering with transformers: {statistics.median(float(d.stdout) for d in done):.2f} s")


if __name__ == "__main__":
    main()
