"""Imports effllm, which registers its format, as soon as transformers or peft is about to be imported.

Runs at the start of an interpreter: from the sitecustomize beside it, or as the line of `effllm autoload`.
"""

import sys


class Startup:
    """Finds nothing itself. An environment that does not have effllm stays as it is."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name in ("transformers", "peft"):
            try:  # noqa: SIM105
                import effllm  # noqa: F401
            except Exception:
                pass


sys.meta_path.insert(0, Startup())
