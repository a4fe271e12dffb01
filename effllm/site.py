"""Sites: the places of a model where a method can act, found by structure.

A site is named by its module path in the class that the model's config names. Weights that are tied are one site.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

Role = Literal["block", "embedding", "head"]


@dataclass(frozen=True)
class Site:
    """A weight that a codec can replace."""

    name: str
    """Module path, e.g. `model.layers.3.mlp.down_proj`."""
    shape: tuple[int, int]
    """`[rows, columns]`: `[out, in]` of a Linear or Conv1D, `[entries, width]` of an Embedding."""
    role: Role
    """`block`: inside a repeated block. `embedding`: an Embedding outside. `head`: any other matrix outside."""
    block: str | None = None
    """Module path of the block that holds it."""
    tied: tuple[str, ...] = ()
    """Module paths of other modules that use the same weight."""

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]


def find_blocks(model: nn.Module) -> list[str]:
    """Module paths of the repeated blocks, in the order in which they are registered.

    A stack is an outermost `nn.ModuleList` whose members hold weight matrices.
    """
    stacks: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(stack + ".") for stack in stacks)
        if isinstance(module, nn.ModuleList) and not inside and any(True for _ in _weight_modules(module)):
            stacks.append(name)
    return [f"{stack}.{index}" for stack in stacks for index, _ in model.get_submodule(stack).named_children()]


def find_sites(model: nn.Module) -> list[Site]:
    """Every weight of `model` that a codec can replace, in module order. Works on the meta device."""
    blocks = find_blocks(model)
    tied = _tied_modules(model)
    sites = []
    for name, module in _weight_modules(model):
        if name in tied:
            continue
        block = next((b for b in blocks if name.startswith(b + ".")), None)
        role: Role = "block" if block else "embedding" if isinstance(module, nn.Embedding) else "head"
        partners = tuple(target for target, source in tied.items() if source == name)
        sites.append(Site(name, matrix_shape(module), role, block, partners))
    return sites


def unchanged(model: nn.Module, assigned: Collection[str]) -> list[tuple[str, float]]:
    """Weights above 1 % of the model's bytes that are at no site in `assigned`, with their share of the bytes."""
    covered = {name for site in find_sites(model) if site.name in assigned for name in (site.name, *site.tied)}
    tied = {f"{name}.weight" for site in find_sites(model) for name in site.tied}
    sizes = {key: tensor.nbytes for key, tensor in model.state_dict().items() if key not in tied}
    total = sum(sizes.values())
    return [
        (key, size / total)
        for key, size in sizes.items()
        if size > 0.01 * total and key.removesuffix(".weight") not in covered
    ]


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """The shape of a module's weight as a codec sees it, `[rows, columns]`."""
    rows, columns = cast(torch.Tensor, module.weight).shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def matrix(module: nn.Module) -> torch.Tensor:
    """A module's weight as a codec sees it: `[rows, columns]`, contiguous."""
    weight = cast(torch.Tensor, module.weight).detach()
    return weight.t().contiguous() if isinstance(module, Conv1D) else weight


def _weight_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    attention = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    for name, module in model.named_modules():
        if any(name.startswith(parent + ".") for parent in attention) or not _is_weight(module):
            continue
        yield name, module


def _is_weight(module: nn.Module) -> bool:
    if isinstance(module, NonDynamicallyQuantizableLinear) or parametrize.is_parametrized(module):
        return False
    if isinstance(module, (nn.Embedding, Conv1D)):
        return module.weight.dim() == 2
    return isinstance(module, nn.Linear) and (cooperates(type(module)) or computes_linear(type(module)))  # type: ignore[arg-type]


@cache
def cooperates(cls: Any) -> bool:
    """Whether a subclass keeps the inherited forward or calls it through `super()`."""
    forward = cls.forward
    return forward in (nn.Linear.forward, nn.Embedding.forward, Conv1D.forward) or "super" in forward.__code__.co_names


@cache
def computes_linear(cls: Any) -> bool:
    """Whether a Linear subclass with a forward of its own still computes x W^T + b, tried on a small one."""
    try:
        with torch.device("cpu"):
            module = cls(3, 2)
            x = torch.ones(1, 3)
            return torch.allclose(module(x), F.linear(x, module.weight, module.bias), atol=1e-6)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False


def _tied_modules(model: nn.Module) -> dict[str, str]:
    """Module path -> module path of the weight that it shares: what the model declares, then what is one tensor."""
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {
        target.removesuffix(".weight"): source.removesuffix(".weight")
        for target, source in declared.items()
        if target.endswith(".weight") and source.endswith(".weight")
    }
    first: dict[int, str] = {}
    for name, module in _weight_modules(model):
        owner = first.setdefault(id(module.weight), name)
        if owner != name and name not in tied and tied.get(owner) != name:
            tied[name] = owner
    return tied
