"""AutoRound with signed gradient descent; settings: bits or average and options, group, iters, batch.

With `average`, AutoScheme first chooses a width for each Linear out of `options`, so that all its bits average to that.
AutoScheme reads text only: the calibration tokens are written out as text, and windows are a little shorter, since a text
may come back as fewer tokens.
"""

import json
from typing import Any

import torch
from auto_round import AutoRound, AutoScheme
from common import Compressed, Job, gptq_layer, linears, of_layer, run, saved_tensors
from transformers import AutoTokenizer

SPARE = 8  # tokens that a window of text may lose


def compress(job: Job) -> dict[str, Compressed]:
    settings, tokens, model = job.settings, job.tokens(), job.load(torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    columns = {name: layer.in_features for name, layer in linears(model).items()}
    how: dict[str, Any] = {"dataset": list(tokens.split(1)), "seqlen": tokens.shape[1]}
    if "average" in settings:
        texts = job.calibration.with_suffix(".json")
        texts.write_text(json.dumps(tokenizer.batch_decode(tokens, skip_special_tokens=True)))
        how = {"dataset": str(texts), "seqlen": tokens.shape[1] - SPARE}
        how["scheme"] = AutoScheme(avg_bits=settings["average"], options=settings["options"])
    else:
        how |= {"bits": settings["bits"], "group_size": settings["group"], "sym": True}
    rounding = AutoRound(
        model,
        tokenizer,
        iters=settings["iters"],
        batch_size=settings["batch"],
        nsamples=len(tokens),
        device_map="cpu",
        enable_torch_compile=False,
        low_cpu_mem_usage=False,
        **how,
    )
    rounding.quantize()
    job.done()
    rounding.save_quantized(str(job.packed()), format="auto_round")
    saved = saved_tensors(job.packed())
    return {name: gptq_layer(of_layer(saved, name), width, 1) for name, width in columns.items()}


run(compress, "auto-round")
