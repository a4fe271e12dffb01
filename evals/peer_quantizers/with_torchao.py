"""torchao's int4 weights in the layout of its CPU kernel; settings: group."""

import torch
from common import Compressed, Job, linears, read_weight, run, stored_bits
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import quantize_


def compress(job: Job) -> dict[str, Compressed]:
    model = job.load(torch.bfloat16)
    names = list(linears(model))
    config = PrototypeInt4WeightOnlyConfig(group_size=job.settings["group"])
    quantize_(model, config, lambda _, name: name in names)
    job.done()
    found = {}
    for name in names:
        layer = model.get_submodule(name)
        bits = stored_bits(layer.weight.qdata, layer.weight.scale_and_zero)
        found[name] = Compressed(read_weight(layer, layer.in_features, torch.bfloat16), bits)
    return found


run(compress, "torchao")
