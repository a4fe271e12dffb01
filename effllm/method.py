"""What a method is, and where methods are found.

A method is one file in `effllm/methods/`: the file's name is the method's name, its class is its configuration (typed
fields) and the class docstring is its documentation. Other packages add methods through the entry-point group
`effllm.methods` (entry-point name = method name, value = the class). Nothing else is edited to add one.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from effllm.errors import EffllmError, UsageError

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
        """The short text of tables: the name, the first setting, and those that differ from their defaults; then the
        methods that it is made of."""
        parts = {key: value for key in type(self).model_fields if isinstance(value := getattr(self, key), Method)}
        values = {key: value for key, value in self.settings().items() if key not in parts}
        shown = {*list(values)[:1], *self.model_dump(exclude_defaults=True)}
        texts = [f"{key}={value}" for key, value in values.items() if key in shown]
        texts += [f"{key}={part.label()}" for key, part in parts.items()]
        return self.name() + (":" + ",".join(texts) if texts else "")


class Codec(Method):
    """A weight as fewer bytes.

    A weight is always a matrix `[rows, columns]` whose columns are what it is multiplied with: `[out, in]` of a Linear
    (also of GPT-2's Conv1D, which holds it transposed) or of one expert of a mixture, `[out, in / groups * kernel]` of a
    convolution, and `[entries, width]` of an Embedding.
    """

    trainable: ClassVar[tuple[str, ...]] = ()
    """Stored float tensors, in which `decode` is differentiable, that training may change."""
    by_rows: ClassVar[bool] = True
    """Whether each row is encoded on its own, so that a sample of them tells what all cost. A low-rank form is not."""

    @classmethod
    def grid(cls, site: Site) -> list[Codec]:
        """The options that make sense at `site`, in no order; empty where the codec does not apply."""
        raise UsageError(f"{cls.name()} lists no options (it has no grid), so a budget cannot choose it: name one")

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
    try:
        stored = codec.encode(torch.empty(shape, device="meta"))
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in stored.items()}
    except (RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        raise EffllmError(
            f"{codec.label()} does not tell what it stores of a weight {list(shape)}: encode must return a dictionary of "
            f"tensors for a weight on the meta device too, so no shape may depend on values ({error})"
        ) from error


class Edit(Method):
    """A change of a model that is no codec's: of what it computes, and perhaps of which weights it has."""

    structure: ClassVar[bool] = False
    """Whether it changes which weights there are. Then it is made before all else, so that codecs find the new ones, and
    before weights are read where a compressed model is loaded."""

    @abstractmethod
    def attach(self, model: nn.Module) -> None:
        """Makes the change. Called where a model is compressed and where a compressed one is loaded; of a structure also
        on a model on the meta device, whose new weights are filled in later.

        Raises:
            EffllmError: the edit cannot act on this model, and why.
        """

    @abstractmethod
    def detach(self, model: nn.Module) -> None:
        """Undoes the change: no hook, no attribute is left; nothing where it is not on the model."""

    def learn(self, source: Source, batches: Sequence[Batch]) -> Iterator[dict[str, Tensor]]:
        """The values of the weights that `attach` adds, by their names in the state dict, a block's at a time, say.

        `source` is the model without the edit: walk it, and let `effllm.train.learn` train what has to be trained.
        `batches` are as `Score.score` has them.
        """
        yield from ()


class Score(Method):
    """An ordering of blocks by importance. It stands in for a price where a plan says so."""

    @abstractmethod
    def score(self, source: Source, batches: Sequence[Batch]) -> dict[str, float]:
        """Block name -> importance, larger = more important; a block that the data never reach may be left out.

        `batches` are inputs of the model by name, such as `{"input_ids": [sequences, length]}` (int64) or
        `{"pixel_values": [images, channels, height, width]}`; empty unless the class sets `needs_data`.
        """
