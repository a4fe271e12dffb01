"""bitsandbytes NF4; settings: block, double_quant."""

import bitsandbytes.functional as bnb
from common import Compressed, Job, linears, run, stored_bits


def compress(job: Job) -> dict[str, Compressed]:
    found = {}
    for name, layer in linears(job.load()).items():
        codes, state = bnb.quantize_4bit(
            layer.weight.data,
            blocksize=job.settings["block"],
            quant_type="nf4",
            compress_statistics=job.settings["double_quant"],
        )
        bits = stored_bits(codes, state.absmax)
        if state.nested:
            bits += stored_bits(state.state2.absmax, state.offset)
        found[name] = Compressed(bnb.dequantize_4bit(codes, state).float(), bits)
    return found


run(compress, "bitsandbytes")
