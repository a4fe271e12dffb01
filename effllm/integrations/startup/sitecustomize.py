"""Runs `effllm_startup` in a Python process that `effllm run` has started, then the sitecustomize that this one shadows."""

import os
import sys

import effllm_startup  # noqa: F401

sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(__file__)]  # noqa: PTH120
del sys.modules["sitecustomize"]
import sitecustomize  # noqa: E402, F401  (site takes its absence for what it is)
