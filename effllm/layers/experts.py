"""Experts of a mixture: one parameter `[experts, ...]` of the model, held as encoded matrices.

The experts module keeps its class's own forward, which asks for the matrix of one expert at a time
(`self.gate_up_proj[expert]`) and gets it decoded. Experts that share a codec are stored as one tensor `[experts, ...]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from effllm.layers.base import CodecModule
from effllm.method import Codec
from effllm.site import expert_shape


class CodecExpertGroup(CodecModule):
    """Experts that share a codec: every stored tensor has one more dimension in front, the experts."""

    experts: tuple[int, ...]
    """Their numbers within the layer, ascending."""

    def one(self, position: int) -> Tensor:
        """The matrix `[rows, columns]` of the expert at `position` of the group, in the codec's own dtype."""
        return self.codec.decode({name: tensor[position] for name, tensor in self.stored().items()}, self.matrix_shape)


class DenseExpertGroup(nn.Module):
    """Experts that no codec touches, `[experts, rows, columns]`."""

    def __init__(self, experts: tuple[int, ...], matrices: Tensor):
        super().__init__()
        self.experts = experts
        self.dense = nn.Parameter(matrices, requires_grad=matrices.requires_grad)

    def one(self, position: int) -> Tensor:
        return self.dense[position]


class CodecExpertWeights(nn.Module):
    """Stands for a parameter `[experts, out, in]` (`[experts, in, out]` where `transposed`); `weights[e]` is one expert.

    Each group is a submodule named by its first expert.
    """

    _is_hf_initialized = True

    def __init__(self, groups: list[CodecExpertGroup | DenseExpertGroup], transposed: bool, dtype: torch.dtype):
        super().__init__()
        self.transposed, self.compute_dtype = transposed, dtype
        for group in groups:
            self.add_module(str(group.experts[0]), group)

    def __len__(self) -> int:
        return sum(len(group.experts) for group in self._groups())

    def _groups(self) -> list[Any]:
        return list(self._modules.values())

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        number = int(expert)
        group = next(group for group in self._groups() if number in group.experts)
        matrix = group.one(group.experts.index(number)).to(self.compute_dtype)
        return cast(Tensor, matrix.t() if self.transposed else matrix)

    def decoded(self) -> Tensor:
        """The dense parameter."""
        return torch.stack([self[expert] for expert in range(len(self))])

    def _apply(self, fn: Any, recurse: bool = True) -> CodecExpertWeights:
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype)).dtype
        super()._apply(fn, recurse)
        return self


class CodecExperts(nn.Module):
    """Mixed into an experts class: its forward that loops over the experts, whatever implementation the config names."""

    replaced_class: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return cast(Tensor, cast(Any, self.replaced_class.forward).__wrapped__(self, *args, **kwargs))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.replaced_class, self.__dict__)


@cache
def _experts_class(base: Any) -> type[CodecExperts]:
    return cast(type[CodecExperts], type(f"Codec{base.__name__}", (CodecExperts, base), {"replaced_class": base}))


def _rebuild(base: type[nn.Module], state: dict[str, Any]) -> CodecExperts:
    cls = _experts_class(base)  # type: ignore[arg-type]
    module = cls.__new__(cls)
    module.__dict__.update(state)
    return module


def codec_experts(module: nn.Module, parameter: str, groups: Mapping[Codec, tuple[int, ...]],
                  stored: Mapping[Codec, dict[str, Tensor]]) -> CodecExperts:  # fmt: skip
    """`module` with `parameter` held by groups of experts; another parameter may have been replaced before.

    `groups` says which experts have each codec, `stored` their stacked tensors; other experts stay dense.
    """
    weight = cast(nn.Parameter, getattr(module, parameter))
    transposed, shape = bool(cast(Any, module).is_transposed), expert_shape(module, weight)
    members: list[CodecExpertGroup | DenseExpertGroup] = []
    for codec, experts in groups.items():
        group = CodecExpertGroup()
        group.codec, group.matrix_shape, group.compute_dtype, group.experts = codec, shape, weight.dtype, experts
        group.store(stored[codec])
        members.append(group)
    dense = tuple(sorted(set(range(len(weight))) - {expert for experts in groups.values() for expert in experts}))
    if dense:
        kept = weight.detach()[list(dense)]
        members.append(DenseExpertGroup(dense, kept.transpose(1, 2).contiguous() if transposed else kept))
    state = {**module.__dict__, "_parameters": dict(module._parameters), "_modules": dict(module._modules)}
    del state["_parameters"][parameter]
    base = module.replaced_class if isinstance(module, CodecExperts) else type(module)
    experts_module = _rebuild(base, state)
    members.sort(key=lambda group: group.experts[0])
    experts_module.add_module(parameter, CodecExpertWeights(members, transposed, weight.dtype))
    return experts_module


def dense_experts(module: CodecExperts) -> nn.Module:
    """The experts module of the class that `module` replaces, with its parameters decoded."""
    plain = module.replaced_class.__new__(module.replaced_class)
    plain.__dict__.update(
        {**module.__dict__, "_parameters": dict(module._parameters), "_modules": dict(module._modules)}
    )
    for name, weights in module._modules.items():
        if isinstance(weights, CodecExpertWeights):
            del plain._modules[name]
            plain._parameters[name] = nn.Parameter(weights.decoded(), requires_grad=False)
    return plain
