"""A model as a stream of units, one of them in memory at a time: from a checkpoint, or already live."""

from effllm.source.base import Batch, Source, arithmetic, evaluating, in_dtype, run_batch
from effllm.source.live import LiveModel
from effllm.source.stored import StoredModel

__all__ = ["Batch", "LiveModel", "Source", "StoredModel", "arithmetic", "evaluating", "in_dtype", "run_batch"]
