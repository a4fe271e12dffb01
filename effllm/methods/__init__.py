"""One file a method, or one small package. Names with a leading underscore are helpers, not methods.

The package is also the function `effllm.methods()`: every registered method by name.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

    from effllm.method import Method
else:
    ModuleType = type(sys)  # `types` is not imported at the start of an interpreter


class _Methods(ModuleType):
    def __call__(self) -> dict[str, type[Method]]:
        """Every registered method by name; the class docstring is its documentation."""
        from effllm.registry import methods

        return methods()


sys.modules[__name__].__class__ = _Methods
