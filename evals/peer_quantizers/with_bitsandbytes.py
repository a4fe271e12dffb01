"""bitsandbytes NF4; settings: block, double_quant."""

import bitsandbytes.functional as bnb
import torch
from common import Compressed, Job, linears, run, stored_bits


def compress(job: Job) -> dict[str, Compressed]:
    quantised = {
        name: bnb.quantize_4bit(
            layer.weight.data,
            blocksize=job.settings["block"],
            quant_type="nf4",
            compress_statistics=job.settings["double_quant"],
        )
        for name, layer in linears(job.load(torch.bfloat16)).items()
    }
    job.done()
    found = {}
    for name, (codes, state) in quantised.items():
        bits = stored_bits(codes, *state.as_dict(packed=True).values())
        state.dtype = torch.float32
        found[name] = Compressed(bnb.dequantize_4bit(codes, state), bits)
    return found


run(compress, "bitsandbytes")
