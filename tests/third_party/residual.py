"""What one codec leaves, encoded by another."""

from effllm.method import Codec
from effllm.methods.quantize import Quantize
from effllm.registry import CodecField


class Residual(Codec):
    """A weight as the sum of two encoded matrices: bits per weight add up.

    Source: a test of codecs that are made of codecs.
    """

    paper = "control"
    first: CodecField = Quantize(bits=3)
    second: CodecField = Quantize(bits=2)

    @classmethod
    def grid(cls, site):
        return [cls(first=Quantize(bits=bits), second=Quantize(bits=2)) for bits in (2, 4)]

    def encode(self, weight, moments=None):
        first = self.first.encode(weight, moments)
        second = self.second.encode(weight.float() - self.first.decode(first, tuple(weight.shape)).float(), moments)
        return {
            f"{part}_{name}": one for part, data in (("first", first), ("second", second)) for name, one in data.items()
        }

    def decode(self, data, shape):
        return sum(
            codec.decode(
                {key.removeprefix(f"{part}_"): one for key, one in data.items() if key.startswith(part)}, shape
            )
            for part, codec in (("first", self.first), ("second", self.second))
        )
