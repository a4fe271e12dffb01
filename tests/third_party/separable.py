"""Kernels that are a column times a row."""

import torch

from effllm.method import Codec


class Separable(Codec):
    """Each two-dimensional kernel as the best outer product of two vectors, in fp16: 16 (h + w) / (h w) bits per weight.

    Source: Rigamonti et al., "Learning separable filters", CVPR 2013.
    """

    paper = "Rigamonti et al., 2013"
    kernel: tuple[int, int] = (3, 3)

    @classmethod
    def grid(cls, site):
        return [cls(kernel=site.kernel)] if len(site.kernel) == 2 and min(site.kernel) > 1 else []

    def encode(self, weight, moments=None):
        left, sizes, right = torch.linalg.svd(weight.float().unflatten(1, (-1, *self.kernel)), full_matrices=False)
        root = sizes[..., :1].sqrt()
        return {"column": (left[..., 0] * root).half(), "row": (right[..., 0, :] * root).half()}

    def decode(self, data, shape):
        return (data["column"].float().unsqueeze(-1) * data["row"].float().unsqueeze(-2)).view(shape)
