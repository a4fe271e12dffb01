"""HQQ; settings: bits, group."""

import torch
from common import Compressed, Job, grouped_bits, linears, run
from hqq.core.quantize import Quantizer


def compress(job: Job) -> dict[str, Compressed]:
    bits, group = job.settings["bits"], job.settings["group"]
    found = {}
    for name, layer in linears(job.load()).items():
        codes, meta = Quantizer.quantize(
            layer.weight.data, nbits=bits, group_size=group, axis=1, device="cpu", compute_dtype=torch.float32
        )
        meta["scale"], meta["zero"] = (meta[key].half().float() for key in ("scale", "zero"))
        weight = Quantizer.dequantize(codes, meta).float()
        found[name] = Compressed(weight, grouped_bits(tuple(weight.shape), bits, group, per_group=32))
    return found


run(compress, "hqq")
