"""llm-compressor's GPTQ; settings: bits, group."""

import torch
from common import Compressed, Job, linears, of_layer, run, saved_tensors, stored_bits
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier


def compress(job: Job) -> dict[str, Compressed]:
    tokens, model = job.tokens(), job.load(torch.bfloat16)
    names = list(linears(model))
    weights = {
        "num_bits": job.settings["bits"],
        "group_size": job.settings["group"],
        "strategy": "group",
        "type": "int",
    }
    recipe = GPTQModifier(
        ignore=["lm_head"], config_groups={"all": {"targets": ["Linear"], "weights": weights | {"symmetric": True}}}
    )
    samples = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
    oneshot(
        model=model,
        dataset=samples,
        recipe=recipe,
        max_seq_length=tokens.shape[1],
        num_calibration_samples=len(tokens),
        shuffle_calibration_samples=False,
    )
    job.done()
    found = {name: model.get_submodule(name).weight.data.float().clone() for name in names}
    model.save_pretrained(job.packed(), save_compressed=True)
    saved = saved_tensors(job.packed())
    return {name: Compressed(found[name], stored_bits(*of_layer(saved, name).values())) for name in names}


run(compress, "llmcompressor")
