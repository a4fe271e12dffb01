"""A model folder on disk: its files and headers, the checksums of its tensors, and the empty model that it describes."""

from effllm.checkpoint.folder import INDEX as INDEX
from effllm.checkpoint.folder import Checkpoint as Checkpoint
from effllm.checkpoint.folder import StoredTensor as StoredTensor
from effllm.checkpoint.folder import aliases as aliases
from effllm.checkpoint.folder import read_config as read_config
from effllm.checkpoint.folder import read_header as read_header
from effllm.checkpoint.folder import resolve as resolve
