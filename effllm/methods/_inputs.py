"""What codecs share that map a layer's inputs: W x = (W T)(T^-1 x), and another codec encodes W T."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from pydantic import field_validator
from torch import Tensor

from effllm.method import Codec, Layout
from effllm.methods.quantize import Quantize
from effllm.moments import Metric, Moments
from effllm.registry import CodecField

AT_ONCE = 1 << 22  # numbers of a metric that are mapped together
Data = dict[str, Tensor]


class MapsInputs(Codec):
    """A codec made of a map T of the inputs, and of the codec that encodes what a weight then is."""

    maps: ClassVar[tuple[str, ...]] = ()
    """The tensors that `fit` gives."""
    codec: CodecField = Quantize()

    @abstractmethod
    def fit(self, weight: Tensor, moments: Moments | None) -> Data:
        """What is stored of T for `weight` `[rows, columns]`."""

    @abstractmethod
    def into(self, weight: Tensor, data: Data) -> Tensor:
        """W T for W `[..., columns]`."""

    @abstractmethod
    def back(self, weight: Tensor, data: Data) -> Tensor:
        """W T^-1, the inverse of `into`."""

    @abstractmethod
    def inputs(self, x: Tensor, data: Data) -> Tensor:
        """x T^-T for x `[..., columns]`."""

    @field_validator("codec")
    @classmethod
    def _maps_once(cls, codec: Codec) -> Codec:
        if isinstance(codec, MapsInputs):
            raise ValueError(f"{codec.name()} maps the inputs itself and cannot stand inside {cls.name()}")
        return codec

    @property
    def trainable(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.codec.trainable

    @property
    def by_rows(self) -> bool:  # type: ignore[override]
        return self.codec.by_rows

    def layout(self, shape: tuple[int, int]) -> Layout:
        own = self.fit(torch.empty(shape, device="meta"), None)
        return self.codec.layout(shape) | {name: (tuple(one.shape), one.dtype) for name, one in own.items()}

    def encode(self, weight: Tensor, moments: Moments | None = None) -> Data:
        return self.encode_each([self], weight, moments)[0]

    @classmethod
    def encode_each(cls, codecs: Sequence[Codec], weight: Tensor, moments: Moments | None = None) -> list[Data]:
        """Codecs that differ in the inner one alone share the map, and what the inner ones share."""
        own = cast(Sequence[MapsInputs], codecs)
        alike: dict[tuple[object, ...], list[MapsInputs]] = {}
        for codec in own:
            mapping = codec.model_dump(exclude={"codec"}).values()
            alike.setdefault((type(codec.codec), *mapping), []).append(codec)
        found: dict[MapsInputs, Data] = {}
        for members in alike.values():
            first, inner = members[0], [member.codec for member in members]
            data = first.fit(weight, moments)
            mapped, seen = first.into(weight.float(), data), first._seen(moments, data)
            encoded = type(inner[0]).encode_each(inner, mapped, seen)
            found |= {member: {**one, **data} for member, one in zip(members, encoded, strict=True)}
        return [found[codec] for codec in own]

    def refine(self, data: Data, weight: Tensor, moments: Moments) -> Data:
        seen = cast(Moments, self._seen(moments, data))
        return {**data, **self.codec.refine(self._inner(data), self.into(weight.float(), data), seen)}

    def decode(self, data: Data, shape: tuple[int, int]) -> Tensor:
        return self.back(self.codec.decode(self._inner(data), shape), data)

    def decode_rows(self, data: Data, index: Tensor, shape: tuple[int, int]) -> Tensor:
        return self.back(self.codec.decode_rows(self._inner(data), index, shape), data)

    def linear(self, x: Tensor, data: Data, shape: tuple[int, int]) -> Tensor:
        return self.codec.linear(self.inputs(x, data).to(x.dtype), self._inner(data), shape)

    def _inner(self, data: Data) -> Data:
        """What the codec inside has stored."""
        return {name: tensor for name, tensor in data.items() if name not in self.maps}

    def _seen(self, moments: Moments | None, data: Data) -> Moments | None:
        """What an error costs that is made in W T: the metric is T^-1 A T^-T. It may be large, and is copied once."""
        if moments is None:
            return None
        moments.solving.release()
        A = moments.solving.dense
        turned, step = torch.empty_like(A), max(1, AT_ONCE // len(A))
        for rows in torch.arange(len(A), device=A.device).split(step):
            turned[:, rows] = self.inputs(A[rows], data).t()
        for rows in torch.arange(len(A), device=A.device).split(step):
            turned[rows] = self.inputs(turned[rows], data)
        return Moments(Metric(turned[None], len(A)), moments.rows)
