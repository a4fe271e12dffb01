"""optimum-quanto, weights only; settings: type (qint4, qint2)."""

import optimum.quanto as quanto
from common import Compressed, Job, grouped_bits, linears, run


def compress(job: Job) -> dict[str, Compressed]:
    model = job.load()
    names = list(linears(model))
    kind = quanto.qtypes[job.settings["type"]]
    quanto.quantize(model, weights=kind, include=names)
    quanto.freeze(model)
    found = {}
    for name in names:
        packed = model.get_submodule(name).weight
        rows, columns = packed.shape
        group = packed._group_size or columns
        per_group = (
            32 if packed._shift.is_floating_point() else 16 + 8
        )  # scale and shift at 16 bits, as in a bf16 model
        bits = grouped_bits((rows, columns), kind.bits, group, per_group)
        found[name] = Compressed(packed.dequantize().float(), bits)
    return found


run(compress, "optimum-quanto")
