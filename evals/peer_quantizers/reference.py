"""What the original model says about the held-out text, kept so that a row costs one forward of the row's model.

KL needs the original's whole distribution p at every token, 262,144 numbers for Gemma. But no peer touches the head W, so
the logits of both models are W times a hidden state h, and

    KL(p, q) = sum p log p - sum p log q = sum p log p - h_q . (sum_v p_v W_v) + logsumexp(W h_q):

one vector of the hidden size and one number a token stand for the distribution, exactly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from effllm.measure.evaluate import Comparison

CHUNK = 128  # tokens whose logits are held at once


class OneDNN(TorchFunctionMode):
    """Linears in float32 by oneDNN: the same to rounding as by the BLAS, twice as fast where that is MKL on AMD."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = function is F.linear and not kwargs and len(args) in (2, 3) and torch.backends.mkldnn.is_available()
        if plain and all(arg is None or (arg.dtype == torch.float32 and arg.device.type == "cpu") for arg in args):
            bias = args[2] if len(args) == 3 else None
            return torch.ops.mkldnn._linear_pointwise(args[0], args[1].contiguous(), bias, "none", [], "")
        return function(*args, **(kwargs or {}))


class Reference:
    """The original's predictions over `windows` `[count, length]`, computed once and kept in `file`."""

    def __init__(self, model: PreTrainedModel, windows: Tensor, file: Path, key: str):
        self.windows, self.head = windows, head_of(model)
        if not file.exists() or stored_key(file) != key:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(file.name + ".part")
            with torch.no_grad(), OneDNN():
                save_file(self._predict(model), part, metadata={"key": key})
            part.replace(file)
        with safe_open(file, "pt") as stored:
            self.kept = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118

    def _predict(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Per predicted token, all windows joined: sum p log p, the expected row of the head, the top token, the nll."""
        columns = self.head.t().contiguous()
        found: dict[str, list[Tensor]] = {"negative_entropy": [], "expected_row": [], "top": [], "nll": []}
        for window in self.windows:
            for hidden, targets in chunks(model, window):
                log_p = F.linear(hidden, self.head).log_softmax(-1)
                p = log_p.exp()
                found["negative_entropy"].append((p * log_p).sum(-1, dtype=torch.float64))
                found["expected_row"].append(F.linear(p, columns))
                found["top"].append(log_p.argmax(-1))
                found["nll"].append(-log_p.gather(1, targets[:, None])[:, 0].double())
        return {name: torch.cat(parts) for name, parts in found.items()}

    def compare(self, model: PreTrainedModel) -> Comparison:
        """`model`, whose head is the original's, against the original: the same as `effllm.measure.evaluate.compare`.

        Raises:
            ValueError: `model` has another head.
        """
        if not torch.equal(head_of(model), self.head):
            raise ValueError("the head was changed; what is kept of the original holds for its own head only")
        with torch.no_grad(), OneDNN():
            rows = self._rows(model)
        nll, kl, agreement = torch.stack(rows).t()
        baseline = self.kept["nll"].view(len(self.windows), -1).mean(1)
        return Comparison(nll, baseline, kl, agreement, self.kept["nll"].numel())

    def _rows(self, model: PreTrainedModel) -> list[Tensor]:
        """Means over each window: nll, KL, agreement."""
        rows, start = [], 0
        for window in self.windows:
            sums = torch.zeros(3, dtype=torch.float64)
            for hidden, targets in chunks(model, window):
                kept = {name: part[start : start + len(hidden)] for name, part in self.kept.items()}
                start += len(hidden)
                logits = F.linear(hidden, self.head)
                normalizer = logits.logsumexp(-1).double()
                expected = (hidden.double() * kept["expected_row"].double()).sum(-1)
                sums[0] += (normalizer - logits.gather(1, targets[:, None])[:, 0].double()).sum()
                sums[1] += (kept["negative_entropy"] - expected + normalizer).sum()
                sums[2] += (logits.argmax(-1) == kept["top"]).sum()
            rows.append(sums / (len(window) - 1))
        return rows


def chunks(model: PreTrainedModel, window: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Final hidden states `[n, d]` of one window, and the tokens that follow, in parts."""
    hidden = model.base_model(input_ids=window[None], use_cache=False).last_hidden_state[0, :-1]
    return list(zip(hidden.split(CHUNK), window[1:].split(CHUNK), strict=True))


def head_of(model: PreTrainedModel) -> Tensor:
    """The weight of a head without a bias or a bound on its logits.

    Raises:
        ValueError: the head is not a plain product.
    """
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None or getattr(model.config, "final_logit_softcapping", None):
        raise ValueError("the logits are not a plain product with the head")
    return head.weight.detach()


def stored_key(file: Path) -> str | None:
    """What a kept reference was computed from."""
    with safe_open(file, "pt") as stored:
        return (stored.metadata() or {}).get("key")
