"""GPTQModel's GPTQ; settings: bits, group, desc_act."""

import gptqmodel
from common import Compressed, Job, gptq_layer, linears, of_layer, run, saved_tensors

gptqmodel._default_cpu_workers = lambda: 2  # on few cores it else asks for more workers than it allows itself


def compress(job: Job) -> dict[str, Compressed]:
    layers = linears(job.load())
    config = gptqmodel.QuantizeConfig(
        bits=job.settings["bits"], group_size=job.settings["group"], desc_act=job.settings["desc_act"], device="cpu"
    )
    model = gptqmodel.GPTQModel.load(str(job.model), config)
    samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in job.tokens()]
    model.quantize(samples, batch_size=1)
    job.done()
    model.save(str(job.packed()))
    saved = saved_tensors(job.packed())
    return {name: gptq_layer(of_layer(saved, name), layer.in_features, 1) for name, layer in layers.items()}


run(compress, "gptqmodel")
