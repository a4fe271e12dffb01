"""Adapters of peft on packed layers: all of them work beside a packed weight, none can be merged into it.

Imported right after `peft.tuners.tuners_utils`, see `effllm.integrations.registration`.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

from effllm.errors import EffllmError

_check_merge_allowed = BaseTuner._check_merge_allowed


@wraps(_check_merge_allowed)
def _check(tuner: Any) -> None:
    """peft's own check, and ours: before any layer is merged.

    Raises:
        EffllmError: an adapter sits on a packed layer.
    """
    from effllm.layers.placing import codec_modules

    _check_merge_allowed(tuner)
    for name, module in tuner.model.named_modules():
        if isinstance(module, BaseTunerLayer):
            for packed in codec_modules(module.get_base_layer()).values():
                raise EffllmError(
                    f"{name} is packed as {packed.codec.label()}, and an adapter cannot be merged into packed weights: "
                    "keep the adapter beside them, or call model.dequantize() first, then merge"
                )


BaseTuner._check_merge_allowed = _check  # type: ignore[method-assign]
