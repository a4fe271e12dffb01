"""What a method is, and where methods are found.

A method is one file in `effllm/methods/`: the file's name is the method's name, its class is its configuration (typed
fields) and the class docstring is its documentation. Other packages add methods through the entry-point group
`effllm.methods` (entry-point name = method name, value = the class). Nothing else is edited to add one.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError
from torch import Tensor, nn

from effllm.errors import UsageError, nearest

if TYPE_CHECKING:
    from effllm.moments import Moments
    from effllm.site import Site
    from effllm.source import Batch, Source

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Method(BaseModel, ABC):
    """The base of all methods: an immutable, hashable, JSON-able configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    paper: ClassVar[str] = ""
    """Where the idea comes from, as a citation key such as `arXiv 2406.17415`."""
    needs_data: ClassVar[bool] = False
    """Whether the method must see calibration data."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Modules that it computes with and that effllm does not install by default; each is an extra of the same name."""

    @classmethod
    def name(cls) -> str:
        """The registered name: the file that defines the class."""
        return cls.__module__.rpartition(".")[2]

    def settings(self) -> dict[str, Any]:
        """Every field as plain JSON values; `from_spec` restores the method from them."""
        return self.model_dump(mode="json")

    def label(self) -> str:
        """The short text of tables: the name, the first setting, and those that differ from their defaults."""
        first, values = list(type(self).model_fields)[:1], self.settings()
        shown = first + [key for key in self.model_dump(exclude_defaults=True) if key not in first]
        return self.name() + (":" + ",".join(f"{key}={values[key]}" for key in shown) if shown else "")


class Codec(Method):
    """A weight as fewer bytes.

    A weight is always a matrix `[rows, columns]` whose columns are what it is multiplied with: `[out, in]` of a Linear
    (also of GPT-2's Conv1D, which holds it transposed) or of one expert of a mixture, `[out, in / groups * kernel]` of a
    convolution, and `[entries, width]` of an Embedding.
    """

    trainable: ClassVar[tuple[str, ...]] = ()
    """Stored float tensors, in which `decode` is differentiable, that training may change."""

    @classmethod
    def grid(cls, site: Site) -> list[Codec]:
        """The options that make sense at `site`, in no order; empty where the codec does not apply."""
        raise NotImplementedError

    @abstractmethod
    def encode(self, weight: Tensor, moments: Moments | None = None) -> dict[str, Tensor]:
        """Exactly the tensors that are stored for `weight` `[rows, columns]`, so that the rate is counted.

        `moments` is what an error costs, or None without data; `moments.solving` is the metric to solve it in. Also
        called with a `weight` on the meta device, to learn names, shapes and dtypes: shapes must not depend on values. No
        tensor may be called `weight`: a reader that does not know the codec would take it for the dense matrix.
        """

    @classmethod
    def encode_each(
        cls, codecs: Sequence[Codec], weight: Tensor, moments: Moments | None = None
    ) -> list[dict[str, Tensor]]:
        """`encode` of one weight by several codecs of this class. Override where they share work."""
        return [codec.encode(weight, moments) for codec in codecs]

    def refine(self, data: dict[str, Tensor], weight: Tensor, moments: Moments) -> dict[str, Tensor]:
        """What `encode` gave for `weight`, improved. For the option that was chosen: prices do without."""
        return data

    @abstractmethod
    def decode(self, data: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """The matrix `[rows, columns]`, in any float dtype, from what `encode` returned. Pure and deterministic."""

    def decode_rows(self, data: dict[str, Tensor], index: Tensor, shape: tuple[int, int]) -> Tensor:
        """Rows `index` `[n]` of the matrix, `[n, columns]`. Override where rows decode on their own."""
        return self.decode(data, shape)[index]

    def linear(self, x: Tensor, data: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """`x @ W.T` for x `[..., columns]`, in x's dtype. Override where a faster or leaner way exists."""
        return F.linear(x, self.decode(data, shape).to(x.dtype))

    def layout(self, shape: tuple[int, int]) -> Layout:
        """Name -> (shape, dtype) of everything that `encode` stores for a matrix of this shape."""
        return _layout(self, shape)

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes that a matrix of this shape takes, everything counted."""
        return sum(math.prod(size) * dtype.itemsize for size, dtype in self.layout(shape).values())


@cache
def _layout(codec: Codec, shape: tuple[int, int]) -> Layout:
    stored = codec.encode(torch.empty(shape, device="meta"))
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()}


class Edit(Method):
    """A change of how a model behaves, made on the loaded model and undone exactly."""

    @abstractmethod
    def attach(self, model: nn.Module) -> None:
        """Makes the change. Called where a model is compressed and where a compressed one is loaded.

        Raises:
            EffllmError: the edit cannot act on this model, and why.
        """

    @abstractmethod
    def detach(self, model: nn.Module) -> None:
        """Undoes the change: no hook, no attribute is left; nothing where it is not on the model."""


class Score(Method):
    """An ordering of blocks by importance. It stands in for a price where a plan says so."""

    @abstractmethod
    def score(self, source: Source, batches: Sequence[Batch]) -> dict[str, float]:
        """Block name -> importance, larger = more important; a block that the data never reach may be left out.

        `batches` are inputs of the model by name, such as `{"input_ids": [sequences, length]}` (int64) or
        `{"pixel_values": [images, channels, height, width]}`; empty unless the class sets `needs_data`.
        """


@cache
def methods() -> dict[str, type[Method]]:
    """Every registered method by name: the files of `effllm.methods`, then the entry-point group `effllm.methods`.

    Raises:
        UsageError: an entry point is no Method, clashes with a name in use, or does not match its file's name.
    """
    package = importlib.import_module("effllm.methods")
    found: dict[str, type[Method]] = {}
    for info in pkgutil.iter_modules(package.__path__):
        if not info.name.startswith("_"):
            module = importlib.import_module(f"{package.__name__}.{info.name}")
            found[info.name] = next(
                value
                for value in vars(module).values()
                if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__
            )
    for point in entry_points(group="effllm.methods"):
        cls = point.load()
        if not (inspect.isclass(cls) and issubclass(cls, Method)):
            raise UsageError(
                f"entry point {point.name} = {point.value} is no effllm Method; name a Codec or Score class"
            )
        if point.name in found or cls.name() != point.name:
            raise UsageError(
                f"entry point {point.name} = {point.value}: the name must be new and the file's: {cls.name()}"
            )
        found[point.name] = cls
    return dict(sorted(found.items()))


def method_class(name: str, kind: type[Method] = Method) -> type[Any]:
    """The class registered as `name`, checked to be of `kind`."""
    known = {key: cls for key, cls in methods().items() if issubclass(cls, kind)}
    if name not in known:
        raise UsageError(f"unknown {kind.__name__.lower()} {name!r}: {nearest(name, known)}")
    return known[name]


def from_spec(spec: str | dict[str, Any] | Method, kind: type[Method] = Method) -> Any:
    """A method from `"quantize"`, `"quantize:bits=6,group_size=32"`, `{"quantize": {"bits": 6}}` or itself.

    The codec inside another one comes last: `"hadamard:codec=quantize:bits=6,group_size=32"`.

    Raises:
        UsageError: an unknown method or setting (the message names the nearest), or a value that it does not take.
    """
    if isinstance(spec, Method):
        return spec
    if isinstance(spec, str):
        name, _, rest = spec.partition(":")
        rest, found, inner = rest.partition("codec=")
        pairs = [item.partition("=") for item in rest.split(",") if item]
        settings: dict[str, Any] = {key.strip(): value.strip() for key, _, value in pairs}
        settings |= {"codec": inner} if found else {}
    elif isinstance(spec, dict) and len(spec) == 1:
        name, settings = next(iter(spec.items()))
        settings = settings or {}
    else:
        raise UsageError(f"a method is written 'name:key=value,...' or {{name: {{key: value}}}}, not {spec!r}")
    cls = method_class(name, kind)
    if not isinstance(settings, dict):
        raise UsageError(f"the settings of {name} are key: value pairs, not {settings!r}")
    return validated(cls, settings, name)


def validated(cls: type[BaseModel], values: dict[str, Any], where: str) -> Any:
    """`cls(**values)`, with pydantic's complaints turned into one line that names the key, the value and the remedy."""
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            leaf = str(first["loc"][-1])
            raise UsageError(f"{where}: unknown key {key!r}: {nearest(leaf, _fields_at(cls, first['loc']))}") from None
        raise UsageError(f"{where}: {key} = {first['input']!r}: {first['msg']}") from None


def _fields_at(cls: type[BaseModel], location: tuple[str | int, ...]) -> list[str]:
    """The field names of the (nested) model in which an unknown key at `location` was found."""
    for part in location[:-1]:
        field = cls.model_fields.get(part) if isinstance(part, str) else None
        if field is not None:
            candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
            cls = next((c for c in candidates if inspect.isclass(c) and issubclass(c, BaseModel)), cls)
    return list(cls.model_fields)


as_spec = PlainSerializer(lambda method: {method.name(): method.settings()})
CodecField = Annotated[Codec, BeforeValidator(lambda value: from_spec(value, Codec)), as_spec]
"""A codec as a field of a plan, or of a codec that is made of another."""
