"""One type of llama.cpp for every Linear, by ggml's own quantiser; settings: type.

The importance matrix is what llama-imatrix collects: the mean square of every input channel over the calibration tokens.
Rows that do not divide by the type's block are joined, where llama-quantize would fall back to a larger type.
"""

import ctypes
import importlib.util
import math
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
        layer.register_forward_pre_hook(lambda _, args: sums[name].add_(args[0].square().flatten(0, -2).sum(0)))

    for name, layer in layers.items():
        watch(name, layer)
    for window in tokens.split(1):
        model.model(input_ids=window, use_cache=False)
    return {name: total / tokens.numel() for name, total in sums.items()}


def library() -> ctypes.CDLL:
    """ggml, as llama-cpp-python built it."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None and spec.origin is not None
    found = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("lib*/libggml-base.*"))))
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    found.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    found.ggml_quantize_chunk.restype = ctypes.c_size_t
    return found


def compress(job: Job) -> dict[str, Compressed]:
    ggml, kind = library(), gguf.GGMLQuantizationType[job.settings["type"]]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    model = job.load()
    layers = linears(model)
    weights_of = importance(model, layers, job.tokens())
    found = {}
    for name, layer in layers.items():
        rows, columns = layer.weight.shape
        joined = block // math.gcd(block, columns)
        if rows % joined:
            raise ValueError(f"{name}: {rows} rows of {columns} cannot be joined to blocks of {block}")
        source = np.ascontiguousarray(layer.weight.detach().numpy()).reshape(rows // joined, columns * joined)
        tiled = np.ascontiguousarray(np.tile(weights_of[name].numpy(), joined), dtype=np.float32)
        codes = np.empty((len(source), source.shape[1] // block * block_bytes), dtype=np.uint8)
        ggml.ggml_quantize_chunk(int(kind), source.ctypes.data, codes.ctypes.data, 0, *source.shape, tiled.ctypes.data)
        decoded = torch.from_numpy(gguf.quants.dequantize(codes, kind).reshape(rows, columns).copy())
        found[name] = Compressed(decoded, 8 * codes.nbytes)
    return found


run(compress, "llama-cpp-python", "gguf")
