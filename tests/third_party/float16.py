"""Weights as they are, in two bytes."""

from effllm.method import Codec


class Float16(Codec):
    """Every weight in fp16: nothing that is stored is an integer.

    Source: IEEE 754.
    """

    paper = "IEEE 754"

    @classmethod
    def grid(cls, site):
        return [cls()]

    def encode(self, weight, moments=None):
        return {"values": weight.half()}

    def decode(self, data, shape):
        return data["values"].float()
