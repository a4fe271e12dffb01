"""`effllm.load`: the documented door to a compressed folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from effllm.checkpoint import Checkpoint, resolve
from effllm.checkpoint.checksum import verify as verify_checksums
from effllm.checkpoint.skeleton import quiet, skeleton, stored_dtype
from effllm.errors import EffllmError


def load(model: str | Path, *, verify: bool = True, **kwargs: Any) -> PreTrainedModel:
    """Loads a compressed (or plain) model folder in the class that its config names, and checks that it computes.

    Args:
        model: a folder, `demo`, an alias or a hub id.
        verify: read every stored tensor once and compare it with its checksum, where the folder carries them.
        kwargs: passed on to `from_pretrained` (`dtype`, `device_map`, ...).

    Raises:
        EffllmError: the folder is damaged or incomplete, or a layer gives values that are not finite.
    """
    checkpoint = Checkpoint.open(resolve(model, kwargs.get("revision")))
    checksums = checkpoint.quantization.get("checksums")
    if verify and checksums is not None:
        verify_checksums(checkpoint, checksums)
    described = skeleton(checkpoint.config, stored_dtype(checkpoint))
    settings = {**kwargs, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with quiet():
        opened: Any = type(described).from_pretrained(checkpoint.folder, **settings)
    loaded, info = opened
    if info["mismatched_keys"]:
        name, found, wanted = min(info["mismatched_keys"])
        raise EffllmError(
            f"{checkpoint.folder}: {name} has shape {list(found)}, but config.json describes {list(wanted)}; download "
            "both again"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise EffllmError(f"{checkpoint.folder} lacks {missing[0]} ({len(missing)} tensors in all); write it again")
    check_finite(loaded)
    return cast(PreTrainedModel, loaded)


@torch.no_grad()
def check_finite(model: PreTrainedModel) -> None:
    """Runs one token through a model that generates, or an empty image through one that takes images alone.

    Raises:
        EffllmError: naming the first layer whose output is not finite.
    """
    inputs = _smallest_input(model)
    if inputs is None:
        return
    broken: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and not broken and not bool(torch.isfinite(first).all()):
                broken.append(name)

        return hook

    leaves = [(n, m) for n, m in model.named_modules() if not list(m.children()) and any(True for _ in m.parameters())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
    finally:
        for handle in handles:
            handle.remove()
    if broken:
        raise EffllmError(f"{broken[0]} gives values that are not finite; the weights there are damaged, or overflow "
                          f"{model.dtype}: try dtype=torch.float32")  # fmt: skip


def _smallest_input(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """One token, or one black image where the config says its size; None for other models."""
    if model.main_input_name == "pixel_values":
        size, channels = (getattr(model.config, key, None) for key in ("image_size", "num_channels"))
        if not isinstance(size, int) or not isinstance(channels, int):
            return None
        return {"pixel_values": torch.zeros(1, channels, size, size, dtype=model.dtype)}
    if model.main_input_name != "input_ids" or model.config.is_encoder_decoder or not model.can_generate():
        return None
    token = model.config.get_text_config().bos_token_id
    token = token[0] if isinstance(token, list) else token
    return {"input_ids": torch.tensor([[token or 0]])}
