"""Statistics of calibration data: gradient-weighted input moments of every weight, by one streamed forward and backward."""

from effllm.statistics.sums import Sums, moments, share_experts
from effllm.statistics.sweep import DRAWS, HEAD, TIED, Sweep
from effllm.statistics.tap import Replay, Tap

__all__ = ["DRAWS", "HEAD", "TIED", "Replay", "Sums", "Sweep", "Tap", "moments", "share_experts"]
