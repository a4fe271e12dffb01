"""Lookup in an encoded table."""

from __future__ import annotations

from torch import Tensor, nn

from effllm.layers.base import CodecModule


class CodecEmbedding(CodecModule, nn.Embedding):  # type: ignore[misc, override]
    """An Embedding `[entries, width]` that decodes only the rows looked up."""

    replaced_class = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        rows = self.codec.decode_rows(self.stored(), input.reshape(-1), self.matrix_shape)
        return rows.to(self.compute_dtype).view(*input.shape, -1)
