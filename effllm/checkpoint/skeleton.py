"""The model that a `config.json` describes, without its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from effllm.checkpoint.folder import Checkpoint
from effllm.errors import EffllmError

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def model_class(config: dict[str, Any]) -> type[PreTrainedModel]:
    """The transformers class that `config.json` names under `architectures`.

    Raises:
        EffllmError: it names none, or one that the installed transformers does not have.
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if not isinstance(name, str):
        raise EffllmError(
            "config.json names no class under 'architectures'; add the one that transformers shall build, such as "
            "LlamaForCausalLM"
        )
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel)):
        raise EffllmError(
            f"config.json names the class {name!r}, which transformers {transformers.__version__} does not have; "
            "upgrade transformers, or load the model yourself and use effllm.compress(model)"
        )
    return found


def load_config(values: dict[str, Any]) -> PreTrainedConfig:
    """The transformers config of a `config.json` dictionary; remote code is never run."""
    values = PreTrainedConfig._decode_special_floats(values)
    known = {key: value for key, value in values.items() if key not in ("auto_map", "quantization_config")}
    kind = known.pop("model_type", None)
    if not isinstance(kind, str):
        raise EffllmError("config.json has no model_type")
    try:
        return AutoConfig.for_model(kind, **known)
    except ValueError:
        raise EffllmError(
            f"config.json has model_type {kind!r}, which transformers {transformers.__version__} does not know; upgrade "
            "transformers, or load the model yourself and use effllm.compress(model)"
        ) from None


def skeleton(config: dict[str, Any], dtype: torch.dtype, device: str | torch.device = "cpu") -> PreTrainedModel:
    """The model that `config.json` describes, on the meta device but for what no checkpoint holds (rotary tables)."""
    cls = model_class(config)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = cls._from_config(load_config(config), dtype=dtype)
    except EffllmError:
        raise
    except Exception as error:  # transformers' checks and the class's own code raise whatever they like
        raise EffllmError(f"config.json describes no {cls.__name__}: {' '.join(str(error).split())}") from error
    model.eval()
    initialisers = {"": model}
    for name, module in model.named_modules():
        initialiser = initialisers[name.rpartition(".")[0]]
        initialisers[name] = module if isinstance(module, PreTrainedModel) else initialiser
        names = module._non_persistent_buffers_set & {n for n, b in module._buffers.items() if b is not None}
        for buffer in names:
            module._buffers[buffer] = torch.empty_like(cast(Tensor, module._buffers[buffer]), device=device)
        if names:
            initialisers[name]._init_weights(module)
    return model


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that the config names (what `from_pretrained` loads), else that of the largest tensor."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    text = checkpoint.config.get("text_config") or {}
    named = named or text.get("dtype") or text.get("torch_dtype")
    largest = max(checkpoint.tensors.values(), key=lambda tensor: tensor.nbytes)
    if named is None:
        return FLOATS.get(largest.dtype, torch.float32)
    dtype = getattr(torch, str(named).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise EffllmError(f"{checkpoint.folder / 'config.json'}: dtype {named!r} is no float dtype of torch")
    return dtype


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars of transformers' own."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
