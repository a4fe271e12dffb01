"""Registers packed models with the libraries that use them, as soon as those are imported and without importing them.

It imports nothing else, so that `import effllm` costs little.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

AFTER = {
    "transformers.quantizers": "effllm.hf",
    "transformers.modeling_utils": "effllm.hf",
    "peft.tuners.tuners_utils": "effllm.integrations.peft",
}
"""Module -> the module of ours that is imported right after it. Where one is imported by another, after the other."""
_loading: set[str] = set()


class _Loader:
    """Runs the module's own loader, then imports ours."""

    def __init__(self, loader: Any):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self.loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader
        _loading.add(module.__name__)
        try:
            self.loader.exec_module(module)
        finally:
            _loading.discard(module.__name__)
        if AFTER[module.__name__] not in {AFTER[other] for other in _loading}:
            _follow(module.__name__)


class _Finder:
    """Finds the modules of `AFTER` as the other finders do."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in AFTER:
            others: list[Any] = [f for f in sys.meta_path if f is not self and hasattr(f, "find_spec")]
            for finder in others:
                spec: ModuleSpec | None = finder.find_spec(fullname, path, target)
                if spec is not None:
                    if spec.loader is not None:
                        spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                    return spec
        return None


def _follow(module: str) -> None:
    """Imports what belongs after `module`. A failure is a warning: the program may have no use for effllm."""
    import importlib
    import warnings

    try:
        importlib.import_module(AFTER[module])
    except Exception as error:
        package = module.partition(".")[0]
        warnings.warn(
            f"effllm does not work with this {package} ({error!r}): pip install --upgrade effllm {package}",
            RuntimeWarning,
            stacklevel=2,
        )


def register_on_import() -> None:
    """Imports our part for every library of `AFTER`: now, or right after the library's own module is imported."""
    loaded = [module for module in AFTER if module in sys.modules]
    if loaded:
        import importlib

        for module in loaded:
            importlib.import_module(AFTER[module])
    if len(loaded) < len(AFTER):
        sys.meta_path.insert(0, _Finder())
