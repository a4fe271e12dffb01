"""effllm makes Hugging Face models small and fast.

Importing it registers the `effllm` format with transformers, at once or as soon as transformers builds models, so that
`AutoModelForCausalLM.from_pretrained` opens compressed folders. Everything else is imported on first use, the standard
library too.
"""

from __future__ import annotations

from effllm import methods as methods
from effllm.integrations.registration import register_on_import

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from effllm.edits import apply as apply
    from effllm.hf import EffllmConfig as Config
    from effllm.integrations.hub import push_to_hub as push_to_hub
    from effllm.loading import load as load
    from effllm.measure.evaluate import evaluate as evaluate
    from effllm.methods.pyramiddrop import PyramidDrop as PyramidDrop
    from effllm.methods.pyramiddrop import apply_pyramiddrop as apply_pyramiddrop
    from effllm.pipeline import compress as compress
    from effllm.plans import Plan as Plan
    from effllm.report.dry_run import plan as plan
    from effllm.streaming import compress_folder as compress_folder

_LAZY = {
    "Config": "effllm.hf:EffllmConfig",
    "Plan": "effllm.plans",
    "PyramidDrop": "effllm.methods.pyramiddrop",
    "apply": "effllm.edits",
    "apply_pyramiddrop": "effllm.methods.pyramiddrop",
    "compress": "effllm.pipeline",
    "compress_folder": "effllm.streaming",
    "evaluate": "effllm.measure.evaluate",
    "load": "effllm.loading",
    "plan": "effllm.report.dry_run",
    "push_to_hub": "effllm.integrations.hub",
}
__all__ = [
    "Config", "Plan", "PyramidDrop", "apply", "apply_pyramiddrop", "compress", "compress_folder", "evaluate", "load",
    "methods", "plan", "push_to_hub",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        module, _, attribute = _LAZY[name].partition(":")
        return getattr(importlib.import_module(module), attribute or name)
    raise AttributeError(f"module 'effllm' has no attribute {name!r}")


register_on_import()
