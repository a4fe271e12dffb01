"""AutoRound; settings: bits, group, iters, batch."""

from auto_round import AutoRound
from common import Compressed, Job, grouped_bits, linears, run
from transformers import AutoTokenizer


def compress(job: Job) -> dict[str, Compressed]:
    bits, group = job.settings["bits"], job.settings["group"]
    tokens, model = job.tokens(), job.load()
    names = list(linears(model))
    rounding = AutoRound(
        model,
        AutoTokenizer.from_pretrained(job.model),
        bits=bits,
        group_size=group,
        sym=True,
        iters=job.settings["iters"],
        batch_size=job.settings["batch"],
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        dataset=list(tokens.split(1)),
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
        low_cpu_mem_usage=False,
    )
    tuned, _ = rounding.quantize()
    found = {}
    for name in names:
        weight = tuned.get_submodule(name).weight.data.float()
        found[name] = Compressed(weight, grouped_bits(tuple(weight.shape), bits, group, per_group=16 + bits))
    return found


run(compress, "auto-round")
