"""Memory that compressing a model needs beside the libraries, told before it begins."""

from __future__ import annotations

import math

import psutil
import torch
from transformers import PreTrainedModel

from effllm.errors import EffllmError
from effllm.measure.memory import hidden_shape
from effllm.plans import Plan
from effllm.site import Site
from effllm.statistics import DRAWS
from effllm.statistics.sums import WIDEST


def working_memory(model: PreTrainedModel, sites: list[Site], wanted: Plan, dtype: torch.dtype) -> int:
    """Bytes that a run needs beside the libraries: a block (or the largest weight outside) twice, and hidden states.

    Where the plan solves, weights and hidden states are fp32, there are moments of a block, one of which is rotated and
    factorised, and gradients of two draws. Where it learns, a block is decoded with gradients beside.
    """
    blocks: dict[str | None, int] = {}
    solved = 2 * 4 * max((min(site.shape[1], WIDEST) ** 2 for site in sites), default=0) if wanted.solves else 0
    width, lanes = (4, 2 + DRAWS) if wanted.solves else (dtype.itemsize, 1)
    for site in sites:
        moments = 2 * min(site.shape[1], WIDEST) ** 2 if wanted.solves else 0
        blocks[site.block or site.name] = blocks.get(site.block or site.name, 0) + site.size * width + moments
    settings, hidden = wanted.calibration, 0
    if wanted.needs_data:
        hidden = math.prod(hidden_shape(sites, model.config, settings.sequence_length))
        hidden *= settings.samples * width * lanes
    return (4 if wanted.effort == "best" else 2) * max(blocks.values(), default=0) + solved + hidden


def refuse_too_large(needed: int, max_memory: int | None, wanted: Plan) -> None:
    """Raises EffllmError where a run needs more bytes than `max_memory`; by default, where it solves, than half of what is
    free."""
    if max_memory is None and not wanted.solves:
        return
    most = max_memory or psutil.virtual_memory().available // 2
    if needed > most:
        whose = "--max-memory" if max_memory else "half of what is free; give --max-memory to use more"
        less = "--fast needs no data" if wanted.limited else "a score without data (--score zd) needs less"
        raise EffllmError(
            f"the run needs about {needed / 1e9:.2f} GB beside the libraries, more than the {most / 1e9:.2f} GB of {whose}; "
            f"or fewer --samples; {less}"
        )
