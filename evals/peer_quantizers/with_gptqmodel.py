"""GPTQModel's GPTQ; settings: bits, group, desc_act."""

import gptqmodel
import torch
from common import Compressed, Job, linears, read_weight, run, stored_bits

gptqmodel._default_cpu_workers = lambda: 2  # on two cores it else asks for more workers than it allows itself


def compress(job: Job) -> dict[str, Compressed]:
    names = list(linears(job.load()))
    config = gptqmodel.QuantizeConfig(
        bits=job.settings["bits"], group_size=job.settings["group"], desc_act=job.settings["desc_act"], device="cpu"
    )
    model = gptqmodel.GPTQModel.load(str(job.model), config)
    samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in job.tokens()]
    model.quantize(samples, batch_size=1)
    packed = job.out.with_name(job.out.name + ".packed")
    model.save(str(packed))
    loaded = gptqmodel.GPTQModel.load(
        str(packed), backend=gptqmodel.BACKEND.GPTQ_TORCH, dtype=torch.float16, device="cpu"
    )
    found = {}
    for name in names:
        layer = loaded.model.get_submodule(name)
        bits = stored_bits(*layer.buffers())
        found[name] = Compressed(read_weight(layer, layer.in_features, torch.float16), bits)
    return found


run(compress, "gptqmodel")
