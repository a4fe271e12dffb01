"""A random checkpoint of the shape of Llama 7B, for measuring memory and speed at full width.

    python scripts/make_large_checkpoint.py OUT --layers 4
    python scripts/make_large_checkpoint.py OUT --delete

Writes `config.json` and one bf16 safetensors shard a layer, tensor by tensor, so that no more than a slice of one tensor is
ever in memory. The values depend on the seed and the tensor's name only: the first layers of a large checkpoint are those of
a small one. 4 layers take 2.1 GB, 12 layers 5.4 GB, all 32 layers 13.5 GB.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import torch

HIDDEN, INNER, HEADS, VOCABULARY = 4096, 11008, 32, 32000
SLICE = 1 << 22  # values drawn at once
Shapes = dict[str, tuple[int, ...]]


def config(layers: int) -> dict[str, object]:
    """`config.json` of Llama 7B with `layers` layers."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def shards(layers: int) -> Iterator[Shapes]:
    """Name -> shape of every tensor, shard by shard."""
    yield {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for index in range(layers):
        prefix = f"model.layers.{index}."
        attention = {f"{prefix}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        yield attention | {
            f"{prefix}mlp.gate_proj.weight": (INNER, HIDDEN),
            f"{prefix}mlp.up_proj.weight": (INNER, HIDDEN),
            f"{prefix}mlp.down_proj.weight": (HIDDEN, INNER),
            f"{prefix}input_layernorm.weight": (HIDDEN,),
            f"{prefix}post_attention_layernorm.weight": (HIDDEN,),
        }
    yield {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def values(name: str, shape: tuple[int, ...], seed: int) -> Iterator[torch.Tensor]:
    """The tensor's values in order, a slice at a time: ones for norms, else normal with sigma 0.02."""
    count = math.prod(shape)
    if len(shape) == 1:
        yield torch.ones(count, dtype=torch.bfloat16)
        return
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    for start in range(0, count, SLICE):
        yield torch.empty(min(SLICE, count - start)).normal_(0, 0.02, generator=generator).bfloat16()


def write_shard(file: Path, shapes: Shapes, seed: int) -> None:
    """One safetensors file: header first, then every tensor as it is drawn."""
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            for part in values(name, shape, seed):
                stream.write(part.view(torch.uint8).numpy().data)


def make(out: Path, layers: int, seed: int = 0) -> int:
    """Writes the checkpoint; returns its bytes."""
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config(layers), indent=2) + "\n")
    weight_map: dict[str, str] = {}
    for index, shapes in enumerate(shards(layers), start=1):
        file = f"model-{index:05d}-of-{layers + 2:05d}.safetensors"
        write_shard(out / file, shapes, seed)
        weight_map |= dict.fromkeys(shapes, file)
    total = sum(2 * math.prod(shape) for shapes in shards(layers) for shape in shapes.values())
    written = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(written, indent=2) + "\n")
    return sum(file.stat().st_size for file in out.glob("*.safetensors"))


def delete(out: Path) -> None:
    """Removes a folder that `make` wrote, and nothing else."""
    path = out / "config.json"
    if not path.is_file() or json.loads(path.read_text()) != config(json.loads(path.read_text())["num_hidden_layers"]):
        raise SystemExit(f"{out} is no checkpoint of this script; not deleted")
    shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delete", action="store_true", help="remove OUT instead")
    arguments = parser.parse_args()
    if arguments.delete:
        delete(arguments.out)
        return
    if arguments.out.exists():
        raise SystemExit(f"{arguments.out} exists; --delete removes it")
    print(f"{arguments.out}: {make(arguments.out, arguments.layers, arguments.seed) / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
