"""Registers the format with transformers without importing transformers."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

BUILDS_MODELS = "transformers.modeling_utils"


class _Loader(Loader):
    """Runs the module's own loader, then registers."""

    def __init__(self, loader: Any):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self.loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module("effllm.hf")


class _Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname != BUILDS_MODELS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def register_on_import() -> None:
    """Imports `effllm.hf` now, or right after transformers' model base class is imported."""
    if BUILDS_MODELS in sys.modules:
        importlib.import_module("effllm.hf")
    else:
        sys.meta_path.insert(0, _Finder())
