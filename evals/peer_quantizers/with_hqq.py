"""HQQ; settings: bits, group."""

import torch
from common import Compressed, Job, linears, run, stored_bits
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear


def compress(job: Job) -> dict[str, Compressed]:
    config = BaseQuantizeConfig(nbits=job.settings["bits"], group_size=job.settings["group"], axis=1)
    quantised = {
        name: HQQLinear(layer, config, compute_dtype=torch.float16, device="cpu", del_orig=False)
        for name, layer in linears(job.load(torch.bfloat16)).items()
    }
    job.done()
    return {
        name: Compressed(layer.dequantize().float(), stored_bits(*layer.state_dict().values()))
        for name, layer in quantised.items()
    }


run(compress, "hqq")
