"""effllm makes Hugging Face models small and fast.

Importing it registers the `effllm` format with transformers, at once or as soon as transformers builds models, so that
`AutoModelForCausalLM.from_pretrained` opens compressed folders. Everything else is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from effllm import methods as methods
from effllm.integrations.registration import register_on_import

__version__ = "0.1.0"

if TYPE_CHECKING:
    from effllm.loading import load as load
    from effllm.measure.evaluate import evaluate as evaluate
    from effllm.pipeline import compress as compress
    from effllm.plans import Plan as Plan
    from effllm.report.dry_run import plan as plan
    from effllm.streaming import compress_folder as compress_folder

_LAZY = {
    "Plan": "effllm.plans",
    "compress": "effllm.pipeline",
    "compress_folder": "effllm.streaming",
    "evaluate": "effllm.measure.evaluate",
    "load": "effllm.loading",
    "plan": "effllm.report.dry_run",
}
__all__ = ["Plan", "compress", "compress_folder", "evaluate", "load", "methods", "plan"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'effllm' has no attribute {name!r}")


register_on_import()
