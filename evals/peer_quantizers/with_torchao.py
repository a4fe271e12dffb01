"""torchao's affine int4 codes with a zero point a group, rounded to nearest; settings: group."""

import torch
from common import Compressed, Job, grouped_bits, linears, run
from torchao.quantization import quant_primitives as primitives


def compress(job: Job) -> dict[str, Compressed]:
    group = job.settings["group"]
    found = {}
    for name, layer in linears(job.load()).items():
        weight, block = layer.weight.data, (1, group)
        scale, zero = primitives.choose_qparams_affine(
            weight, primitives.MappingType.ASYMMETRIC, block, torch.int32, quant_min=0, quant_max=15
        )
        scale = scale.bfloat16().float()
        codes = primitives.quantize_affine(weight, block, scale, zero, torch.int32, quant_min=0, quant_max=15)
        decoded = primitives.dequantize_affine(codes, block, scale, zero, torch.int32, quant_min=0, quant_max=15)
        found[name] = Compressed(decoded.float(), grouped_bits(tuple(weight.shape), 4, group, per_group=16 + 4))
    return found


run(compress, "torchao")
