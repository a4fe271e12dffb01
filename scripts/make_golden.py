"""Writes the golden folders of one format version, which every later version of effllm must load.

    python scripts/make_golden.py tests/golden/format-1

They are made once, with the first release that writes a format, and never made again: a change that makes them differ is a
change of the format. Beside each model, `decoded.json` holds the CRC-32 of every decoded matrix (float32, little-endian)
and the logits of one forward.
"""

from __future__ import annotations

import argparse
import json
import sys
import zlib
from pathlib import Path

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

import effllm
from effllm.layers import CodecModule
from effllm.layers.experts import CodecExpertGroup

TEXT = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**TEXT, tie_word_embeddings=True)),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2)),
    "resnet": (
        ResNetForImageClassification,
        ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic",
                     num_labels=3),
    ),
}  # fmt: skip
STEPS = [
    {"sites": ["*"], "use": "quantize:bits=3,group_size=16"},
    {"sites": ["embeddings"], "use": "quantize:bits=8,group_size=row,range=minmax"},
]
MIXED = {
    "llama": [
        {"sites": ["*.0.*_proj"], "use": "quantize:bits=5,group_size=32,symmetric=true"},
        {"sites": ["*.o_proj"], "use": "quantize:bits=4,group_size=tensor"},
    ],
    "mixtral": [{"sites": ["*.experts.*.1", "*.experts.*.3"], "use": "quantize:bits=6,group_size=24"}],
    "resnet": [{"sites": ["*.convolution"], "use": "quantize:bits=4,group_size=row"}],
}


def decoded(model: PreTrainedModel) -> dict[str, int]:
    """Site -> CRC-32 of its decoded matrix; tied ones under the name of their owner."""
    found, seen = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, CodecExpertGroup):
            parameter = name.rpartition(".")[0]
            found |= {f"{parameter}.{e}": _crc(module.one(position)) for position, e in enumerate(module.experts)}
        elif isinstance(module, CodecModule) and id(module.codes) not in seen:
            seen.add(id(module.codes))
            found[name] = _crc(module.codec.decode(module.stored(), module.matrix_shape))
    return found


def _crc(matrix: torch.Tensor) -> int:
    return zlib.crc32(matrix.float().contiguous().numpy().tobytes())


def one_input(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The input whose logits `decoded.json` holds."""
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.linspace(-1, 1, 32 * 32).view(1, 1, 32, 32)}
    return {"input_ids": torch.arange(8).unsqueeze(0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    if out.exists():
        sys.exit(f"{out} exists: golden folders are made once and never again")
    for name, (cls, config) in MODELS.items():
        torch.manual_seed(0)
        model = cls(config).eval()
        effllm.compress(model, {"name": "golden", "steps": STEPS + MIXED[name]})
        model.save_pretrained(out / name)
        with torch.no_grad():
            logits = [round(x, 6) for x in model(**one_input(model)).logits.flatten().tolist()]
        facts = {"decoded": decoded(model), "logits": logits}
        (out / name / "decoded.json").write_text(json.dumps(facts) + "\n")


if __name__ == "__main__":
    main()
