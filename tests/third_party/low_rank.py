"""Two thin matrices, each encoded by another codec."""

import torch

from effllm.method import Codec
from effllm.methods.quantize import Quantize
from effllm.registry import CodecField


class LowRank(Codec):
    """W as L R of some rank, whose cores `codec` encodes: its bits per weight times rank (rows + columns) / (rows columns).

    Source: the truncated singular value decomposition (Eckart and Young, 1936).
    """

    paper = "Eckart and Young, 1936"
    by_rows = False
    rank: int = 32
    codec: CodecField = Quantize(bits=8)

    @classmethod
    def grid(cls, site):
        return [cls(rank=min(site.shape) // share) for share in (4, 2)]

    def encode(self, weight, moments=None):
        left, sizes, right = torch.linalg.svd(weight.float(), full_matrices=False)
        root = sizes[: self.rank].sqrt()
        cores = {"left": left[:, : self.rank] * root, "right": right[: self.rank] * root.unsqueeze(1)}
        return {f"{name}_{key}": one for name, core in cores.items() for key, one in self.codec.encode(core).items()}

    def decode(self, data, shape):
        left, right = (
            self.codec.decode({k.removeprefix(f"{side}_"): one for k, one in data.items() if k.startswith(side)}, size)
            for side, size in (("left", (shape[0], self.rank)), ("right", (self.rank, shape[1])))
        )
        return left @ right
