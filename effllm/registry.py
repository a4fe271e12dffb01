"""Where methods are found, and how they are named in plans and on the command line."""

from __future__ import annotations

import importlib
import inspect
import logging
import pkgutil
from functools import cache
from importlib.metadata import entry_points
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, PlainSerializer, ValidationError

from effllm.errors import UsageError, nearest
from effllm.method import Codec, Edit, Method, Score

logger = logging.getLogger(__name__)
USES = {
    "codec": "a codec, for a step's 'use' or 'choose', or --set 'GLOB=METHOD'",
    "edit": "an edit, for a step of its own with 'apply', or effllm.apply(model, METHOD)",
    "score": "a score, for a step's 'order', or --score METHOD",
}
"""Kind -> where a plan or the command line takes a method of it."""


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
        try:
            cls = point.load()
        except Exception as error:  # another package's code raises whatever it likes, and must not end every command
            where = getattr(point.dist, "name", point.value)
            logger.warning(
                "method %s of the package %s cannot be imported, and is left out: %r", point.name, where, error
            )
            continue
        if not (inspect.isclass(cls) and issubclass(cls, Method)):
            raise UsageError(
                f"entry point {point.name} = {point.value} is no effllm Method; name a Codec, Edit or Score class"
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
    if name in known:
        return known[name]
    if name in methods():
        raise UsageError(f"{name} is no {kind.__name__.lower()}: it is {USES[kind_of(methods()[name])]}")
    raise UsageError(f"unknown {kind.__name__.lower()} {name!r}: {nearest(name, known)}")


def kind_of(cls: type[Method]) -> str:
    """`codec`, `edit` or `score`."""
    return next(kind.__name__.lower() for kind in (Codec, Edit, Score) if issubclass(cls, kind))


def from_spec(spec: str | dict[str, Any] | Method, kind: type[Method] = Method) -> Any:
    """A method from `"quantize"`, `"quantize:bits=6,group_size=32"`, `{"quantize": {"bits": 6}}` or itself.

    The codec inside another one comes last: `"hadamard:codec=quantize:bits=6,group_size=32"`.

    Raises:
        UsageError: an unknown method or setting (the message names the nearest), or a value that it does not take.
    """
    if isinstance(spec, kind):
        return spec
    if isinstance(spec, Method):
        return method_class(spec.name(), kind)  # which says what it is instead
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
