"""optimum-quanto, weights only; settings: type (qint4, qint2)."""

import optimum.quanto as quanto
import torch
from common import Compressed, Job, linears, run, stored_bits


def compress(job: Job) -> dict[str, Compressed]:
    model = job.load(torch.bfloat16)
    names = list(linears(model))
    quanto.quantize(model, weights=quanto.qtypes[job.settings["type"]], include=names)
    quanto.freeze(model)
    job.done()
    found = {}
    for name in names:
        layer = model.get_submodule(name)
        found[name] = Compressed(layer.weight.dequantize().float(), stored_bits(*layer.state_dict().values()))
    return found


run(compress, "optimum-quanto")
