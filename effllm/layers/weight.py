"""The `.weight` of a codec layer: metadata at no cost, values where somebody reads them, and no writing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from effllm.errors import EffllmError

if TYPE_CHECKING:
    from effllm.layers.base import CodecModule

METADATA = {
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "is_contiguous",
    "is_floating_point", "is_complex", "is_inference", "get_device", "type", "__len__", "__hash__",
}  # fmt: skip
VIEWS = {"T", "mT", "H", "mH", "real", "imag"}
WRITES = {"__setitem__", "set_", "copy_", "__set__", "requires_grad_"}


class PackedWeight(Tensor):
    """Shape, dtype and device of a layer's dense weight. Its values are decoded anew for every function that reads them.

    Most code asks a weight for nothing but its dtype or device. Some reads it beside calling the module (a state-space
    mixer its convolution, a vision-language model one row of its embedding), and gets what the layer computes with.
    Changing it in place would be lost, so it is refused.
    """

    layer: CodecModule

    @staticmethod
    def of(layer: CodecModule, device: torch.device) -> PackedWeight:
        """The weight of `layer`, on `device`."""
        nan = torch.full((), float("nan"), dtype=layer.compute_dtype, device=device)
        weight = Tensor._make_subclass(PackedWeight, layer.arrange(nan.expand(layer.matrix_shape)))
        weight.layer = layer
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PackedWeight({self.layer.codec.label()}, shape={list(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        attribute = getattr(getattr(func, "__self__", None), "__name__", "")  # of a getter or setter
        if name == "__get__" and attribute == "data":
            return args[0]
        if name in METADATA or (name == "__get__" and attribute not in VIEWS):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else None
        in_place = name in WRITES or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
        if "out" in kwargs or (isinstance(first, cls) and in_place and name not in ("__invert__", "__index__")):
            layer = first.layer if isinstance(first, cls) else kwargs["out"].layer
            raise EffllmError(
                f"a weight packed as {layer.codec.label()} cannot be changed in place ({attribute or name}): keep an "
                "adapter beside it, or model.dequantize() first"
            )
        if name == "__getitem__" and isinstance(first, cls):
            row = args[1][0] if isinstance(args[1], tuple) else args[1]
            rest = args[1][1:] if isinstance(args[1], tuple) else ()
            if isinstance(row, int) and rest in ((), (slice(None),)):
                return first.layer.decoded_row(row)
        return func(*[_value(value) for value in args], **{key: _value(value) for key, value in kwargs.items()})


def _value(value: Any) -> Any:
    if isinstance(value, PackedWeight):
        return value if value.is_meta else value.layer.decoded()
    if isinstance(value, (tuple, list)):
        return type(value)(_value(member) for member in value)
    return value
