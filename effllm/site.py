"""Sites: the places of a model where a method can act, found by structure.

A site is named by its module path in the class that the model's config names; an expert of a mixture by the path of the
parameter that holds it and its number. Weights that are tied are one site.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from effllm.errors import UsageError

Role = Literal["block", "embedding", "head"]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
WEIGHTS = (nn.Linear, nn.Embedding, Conv1D, *CONVOLUTIONS)
WORDS: dict[str, Role] = {"blocks": "block", "embeddings": "embedding", "head": "head"}
LARGE = 0.01  # of the model's bytes: a weight above this that nothing touches is named


@dataclass(frozen=True)
class Site:
    """A weight that a codec can replace."""

    name: str
    """Module path, e.g. `model.layers.3.mlp.down_proj`; of an expert `model.layers.3.mlp.experts.down_proj.17`."""
    shape: tuple[int, int]
    """`[rows, columns]`: `[out, in]` of a Linear, Conv1D or expert, `[out, in / groups * kernel]` of a convolution,
    `[entries, width]` of an Embedding."""
    role: Role
    """`block`: inside a repeated block. `embedding`: an Embedding or convolution outside. `head`: any other weight outside.
    In a model without blocks the first weight is `embedding`, the last `head`, those between `block`."""
    block: str | None = None
    """Module path of the block that holds it."""
    tied: tuple[str, ...] = ()
    """Module paths of other modules that use the same weight."""
    expert: int | None = None
    """Its number, where the weight is one expert of a parameter `[experts, ...]`."""
    kernel: tuple[int, ...] = ()
    """The size of a convolution's kernel, the last of what its columns are: `[in / groups, *kernel]`."""

    @property
    def size(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def parameter(self) -> str:
        """Name in the state dict of the tensor that holds the weight."""
        return f"{self.name}.weight" if self.expert is None else self.name.rpartition(".")[0]

    def matrix(self, model: nn.Module) -> torch.Tensor:
        """The weight in `model` as a codec sees it: `[rows, columns]`, contiguous."""
        owner, _, leaf = self.parameter.rpartition(".")
        module = model.get_submodule(owner)
        weight: torch.Tensor = getattr(module, leaf).detach()
        if self.expert is not None:
            weight = weight[self.expert]
            return weight.t().contiguous() if cast(Any, module).is_transposed else weight
        return weight.t().contiguous() if isinstance(module, Conv1D) else weight.flatten(1)

    def write(self, matrix: torch.Tensor, parameter: torch.Tensor, model: nn.Module) -> None:
        """The inverse of `matrix`: puts one `[rows, columns]` at its place in a tensor of the parameter's shape."""
        (parameter if self.expert is None else parameter[self.expert]).copy_(self.arrange(matrix, model))

    def arrange(self, matrix: torch.Tensor, model: nn.Module) -> torch.Tensor:
        """A matrix `[rows, columns]` as the parameter, or as the expert in it, is laid out; differentiable."""
        module = model.get_submodule(self.parameter.rpartition(".")[0])
        if self.expert is not None:
            return matrix.t() if cast(Any, module).is_transposed else matrix
        return matrix.t() if isinstance(module, Conv1D) else matrix.view(cast(Any, module).weight.shape)


def find_blocks(model: nn.Module) -> list[str]:
    """Module paths of the repeated blocks, in the order in which they are registered.

    A stack is an outermost `nn.ModuleList` of modules that hold weights in submodules of their own, or an `nn.Sequential`
    of such modules of which two have one class. Where the members of a stack hold stacks themselves and differ in output
    width, they are the stages of a pyramid, and the blocks are inside them.
    """
    return list(_blocks(model, ""))


def _blocks(module: nn.Module, path: str) -> Iterator[str]:
    members = _stack(module)
    inside = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
    if not members:
        for name, child in inside:
            yield from _blocks(child, name)
    elif len({_output_width(member) for member in members}) > 1 and any(list(_blocks(m, "x")) for m in members):
        for name, child in inside:
            yield from list(_blocks(child, name)) or [name]
    else:
        yield from (name for name, _ in inside)


def _stack(module: nn.Module) -> list[nn.Module]:
    """The members of a stack that hold weights; none where `module` is no stack."""
    if not isinstance(module, (nn.ModuleList, nn.Sequential)):
        return []
    members = [child for child in module if any(True for name, _ in _weights(child, packed=True) if name)]
    alike = len({type(member) for member in members}) < len(members)
    return members if isinstance(module, nn.ModuleList) or alike else []


def _output_width(module: nn.Module) -> int:
    *_, (_, last) = _weights(module, packed=True)
    return matrix_shape(last)[0]


def find_sites(model: nn.Module) -> list[Site]:
    """Every weight of `model` that a codec can replace, in module order. Works on the meta device."""
    blocks = find_blocks(model)
    tied = _tied_modules(model)
    weights = [(name, module) for name, module in _weights(model) if name not in tied]
    sites = []
    for index, (name, module) in enumerate(weights):
        block = next((b for b in blocks if name == b or name.startswith(b + ".")), None)
        if block or not (blocks or index in (0, len(weights) - 1) or isinstance(module, nn.Embedding)):
            role: Role = "block"
        elif isinstance(module, nn.Embedding) or (index == 0 if not blocks else isinstance(module, CONVOLUTIONS)):
            role = "embedding"
        else:
            role = "head"
        if is_experts(module):
            for parameter, weight in _expert_parameters(module):
                path, shape = f"{name}.{parameter}", expert_shape(module, weight)
                sites += [Site(f"{path}.{e}", shape, role, block, expert=e) for e in range(len(weight))]
        else:
            partners = tuple(target for target, source in tied.items() if source == name)
            kernel = module.kernel_size if isinstance(module, CONVOLUTIONS) else ()
            sites.append(Site(name, matrix_shape(module), role, block, partners, kernel=kernel))
    return sites


def select(patterns: list[str], sites: list[Site]) -> list[Site]:
    """The sites that any of `patterns` matches, in model order.

    Raises:
        UsageError: a glob matches nothing (a word may: a tied head is part of the embedding).
    """
    chosen: set[str] = set()
    for pattern in patterns:
        if pattern in WORDS:
            chosen |= {site.name for site in sites if site.role == WORDS[pattern]}
            continue
        found = {s.name for s in sites if any(fnmatch.fnmatchcase(name, pattern) for name in (s.name, *s.tied))}
        if not found:
            raise UsageError(f"{pattern!r} matches no layer of the model; its sites: {examples(sites)}")
        chosen |= found
    return [site for site in sites if site.name in chosen]


def examples(sites: list[Site]) -> str:
    """Some names of sites, for a message."""
    names = [site.name for site in sites]
    return ", ".join(names[:3] + ["..."] * (len(names) > 4) + names[-1:]) if names else "none"


def untied(model: nn.Module, sites: list[Site]) -> dict[str, torch.Tensor]:
    """The state dict with every shared weight once, under the name of the module that owns it."""
    tied = {f"{name}.weight" for site in sites for name in site.tied}
    return {key: tensor for key, tensor in model.state_dict().items() if key not in tied}


def unchanged(model: nn.Module, sites: list[Site], assigned: Collection[str]) -> list[tuple[str, float, str]]:
    """Weights above 1 % of the model's bytes that are at no site in `assigned`: name, share of the bytes, and why."""
    known = {site.parameter for site in sites}
    left = {site.parameter for site in sites if site.name not in assigned}
    state = untied(model, sites)
    total = sum(tensor.nbytes for tensor in state.values())
    return [
        (key, tensor.nbytes / total, "the plan leaves it" if key in known else _reason(model, key))
        for key, tensor in state.items()
        if tensor.dim() > 1 and tensor.nbytes > LARGE * total and (key in left or key not in known)
    ]


def _reason(model: nn.Module, key: str) -> str:
    """Why the tensor `key` is at no site."""
    owner, _, leaf = key.rpartition(".")
    parents = owner.split(".")
    chain = [model.get_submodule(".".join(parents[:end])) for end in range(len(parents), 0, -1)]
    if any(isinstance(module, nn.MultiheadAttention) for module in chain):
        return "inside nn.MultiheadAttention, which reads its weights directly"
    if any(parametrize.is_parametrized(module) for module in chain) or leaf in ("weight_g", "weight_v"):
        return "parametrised: torch.nn.utils.parametrize.remove_parametrizations or remove_weight_norm first"
    tensor = model.state_dict()[key]
    if tensor.dim() == 3 and leaf != "weight":
        return (
            f"a parameter of shape {list(tensor.shape)} that {type(chain[0]).__name__} does not read expert by expert"
        )
    return f"{type(chain[0] if chain else model).__name__} computes with it in a way of its own"


def norms_with_statistics(model: nn.Module) -> dict[str, BatchNorm]:
    """The batch norms that keep running statistics, which a change of the weights makes stale."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, BatchNorm)}
    return {name: norm for name, norm in norms.items() if norm.running_mean is not None}


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """The shape of a module's weight as a codec sees it, `[rows, columns]`."""
    if isinstance(module, CONVOLUTIONS):
        return module.out_channels, module.weight[0].numel()
    if is_experts(module):
        return expert_shape(module, _expert_parameters(module)[-1][1])
    if hasattr(module, "matrix_shape"):  # of a weight that is encoded
        return cast(tuple[int, int], module.matrix_shape)
    rows, columns = cast(torch.Tensor, module.weight).shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def expert_shape(module: nn.Module, weight: torch.Tensor) -> tuple[int, int]:
    """`[rows, columns]` of one expert of `weight`, which an experts module may hold as `[experts, in, out]`."""
    _, one, other = weight.shape
    return (other, one) if cast(Any, module).is_transposed else (one, other)


def _weights(model: nn.Module, experts: bool = True, packed: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Modules whose weight a codec can replace, and with `packed` those of which one has; a module that is registered
    twice comes under both names."""
    attention: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.MultiheadAttention):
            attention.append(name + ".")
        elif not name.startswith(tuple(attention)) and (
            _is_weight(module) or (experts and is_experts(module)) or (packed and hasattr(module, "matrix_shape"))
        ):
            yield name, module


def _is_weight(module: nn.Module) -> bool:
    if isinstance(module, NonDynamicallyQuantizableLinear) or parametrize.is_parametrized(module):
        return False
    weight = module._parameters.get("weight")  # of the hook that weight_norm adds, it is no parameter
    return (
        weight is not None and isinstance(module, WEIGHTS) and (weight.dim() == 2 or isinstance(module, CONVOLUTIONS))
    )


def is_experts(module: nn.Module) -> bool:
    """Whether transformers marks the class as experts whose forward reads one expert of each parameter at a time."""
    return isinstance(getattr(module, "is_transposed", None), bool) and bool(_expert_parameters(module))


def _expert_parameters(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, tensor) for name, tensor in module.named_parameters(recurse=False) if tensor.dim() == 3]


@cache
def cooperates(cls: Any) -> bool:
    """Whether a subclass keeps the inherited forward or calls it through `super()`."""
    forward = cls.forward
    return forward in [base.forward for base in WEIGHTS] or "super" in forward.__code__.co_names


def _tied_modules(model: nn.Module) -> dict[str, str]:
    """Module path -> module path of the weight that it shares: what the model declares, then what is one tensor."""
    declared = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {
        target.removesuffix(".weight"): source.removesuffix(".weight")
        for target, source in declared.items()
        if target.endswith(".weight") and source.endswith(".weight")
    }
    first: dict[int, str] = {}
    for name, module in _weights(model, experts=False):
        owner = first.setdefault(id(module.weight), name)
        if owner != name and name not in tied and tied.get(owner) != name:
            tied[name] = owner
    return tied
