"""One type of llama.cpp for every Linear, by ggml's own quantiser; settings: type.

The importance matrix is what llama-imatrix collects: the mean square of every input channel over the calibration tokens.
Rows that do not divide by the type's block are joined, where llama-quantize would fall back to a larger type.
"""

import ctypes
import math
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from common import Compressed, Job, linears, run
from torch import Tensor, nn
from transformers import PreTrainedModel


@torch.no_grad()
def importance(model: PreTrainedModel, layers: dict[str, nn.Linear], tokens: Tensor) -> dict[str, Tensor]:
    """Mean square of every layer's input channels over `tokens` `[samples, length]`."""
    sums = {name: torch.zeros(layer.in_features) for name, layer in layers.items()}

    def watch(name: str, layer: nn.Linear) -> None:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums[name] += args[0].float().square().flatten(0, -2).sum(0)

        layer.register_forward_pre_hook(add)

    for name, layer in layers.items():
        watch(name, layer)
    for window in tokens.split(1):
        model.model(input_ids=window, use_cache=False)
    return {name: total / tokens.numel() for name, total in sums.items()}


def library() -> ctypes.CDLL:
    """ggml, as it was built into this environment."""
    found = ctypes.CDLL(str(Path(sys.prefix) / "lib" / "libggml-base.so"))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    found.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    return found


def compress(job: Job) -> dict[str, Compressed]:
    ggml, kind = library(), gguf.GGMLQuantizationType[job.settings["type"]]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    model = job.load(torch.bfloat16)
    layers = linears(model)
    weights_of = importance(model, layers, job.tokens())
    quantised = {}
    for name, layer in layers.items():
        rows, columns = layer.weight.shape
        joined = block // math.gcd(block, columns)
        if rows % joined:
            raise ValueError(f"{name}: {rows} rows of {columns} cannot be joined to blocks of {block}")
        source = np.ascontiguousarray(layer.weight.detach().float().numpy()).reshape(rows // joined, columns * joined)
        tiled = np.ascontiguousarray(np.tile(weights_of[name].numpy(), joined), dtype=np.float32)
        codes = np.empty((len(source), source.shape[1] // block * block_bytes), dtype=np.uint8)
        ggml.ggml_quantize_chunk(int(kind), source.ctypes.data, codes.ctypes.data, 0, *source.shape, tiled.ctypes.data)
        quantised[name] = codes
    job.done()
    found = {}
    for name, codes in quantised.items():
        weight = gguf.quants.dequantize(codes, kind).reshape(layers[name].weight.shape)
        found[name] = Compressed(torch.from_numpy(weight.copy()), 8 * codes.nbytes)
    return found


run(compress, "gguf")
