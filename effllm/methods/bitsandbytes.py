"""The formats of bitsandbytes: NF4, FP4 and int8."""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator, ValidationInfo, field_validator
from torch import Tensor

from effllm.errors import EffllmError
from effllm.method import Codec
from effllm.methods._by_rows import CHUNK, encode_by_rows, linear_by_rows

if TYPE_CHECKING:
    from effllm.moments import Moments
    from effllm.site import Site

NESTED = 256  # scales that share one scale under double quantization
FP16_MAX = 65504.0
OPS = torch.ops.bitsandbytes  # resolved at each use; `load` fills it
TABLES: dict[torch.device, Tensor] = {}
Blocksize = Literal[32, 64, 128, 256, 512, 1024]


def load() -> Any:
    """Imports bitsandbytes, without its note on kernels that effllm does not use.

    Raises:
        EffllmError: it is not installed.
    """
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise EffllmError(f"method bitsandbytes: {error}; pip install 'effllm[bitsandbytes]'") from None
    finally:
        logger.setLevel(level)


def dynamic_table(device: torch.device) -> Tensor:
    """The 256 values of the 8-bit dynamic type (Dettmers, arXiv 1511.04561), fp32, in which bitsandbytes stores scales."""
    if device not in TABLES:
        TABLES[device] = load().functional.create_dynamic_map().to(device)
    return TABLES[device]


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdigit() else value


class Bitsandbytes(Codec):
    """NF4, FP4 or int8 as bitsandbytes computes and packs them: 4 + 32 / blocksize bits per weight, or 8 + 32 / columns.

    `nf4` and `fp4`: a block of `blocksize` consecutive inputs of one row shares an fp32 `absmax`; a code is the index of
    the nearest of 16 fixed values in [-1, 1], two to a byte, the first in the high half. `double_quant` stores `absmax`
    less its mean (`absmax_mean`) as 8-bit codes, with one fp32 scale for 256 of them: 4 + 8 / blocksize bits and a little.
    Where `blocksize` does not divide the row, the last block is shorter.

    `int8`: one fp32 `absmax` a row, codes from -127 to 127, from weights in fp16. It is LLM.int8() without outliers, and
    of the weights only: inputs stay as they are.

    Needs `pip install 'effllm[bitsandbytes]'`, also to run what it compressed.

    Source: Dettmers et al., "QLoRA", arXiv 2305.14314, section 3 (NF4, double quantization); Dettmers et al.,
    "LLM.int8()", arXiv 2208.07339, section 2.1 (row-wise absmax).
    """

    paper: ClassVar[str] = "arXiv 2305.14314"
    requires: ClassVar[tuple[str, ...]] = ("bitsandbytes",)
    type: Literal["nf4", "fp4", "int8"] = "nf4"
    blocksize: Annotated[Blocksize, BeforeValidator(_number)] = 64
    double_quant: bool = False

    @field_validator("blocksize", "double_quant")
    @classmethod
    def _int8_has_no_blocks(cls, value: Any, info: ValidationInfo) -> Any:
        if info.data.get("type") == "int8" and value != cls.model_fields[str(info.field_name)].default:
            raise ValueError("int8 has one scale a row; leave it out")
        return value

    def model_post_init(self, context: Any) -> None:
        load()

    def __setstate__(self, state: dict[Any, Any]) -> None:
        super().__setstate__(state)
        load()

    @classmethod
    def grid(cls, site: Site) -> list[Codec]:
        """int8, and NF4 with double quantization: FP4 has more error, plain NF4 more bytes for hardly less."""
        sizes: tuple[Blocksize, ...] = (32, 64, 128, 256)
        blocks = [cls(blocksize=size, double_quant=True) for size in sizes if size <= max(32, site.shape[1])]
        return [cls(type="int8"), *blocks]

    def encode(self, weight: Tensor, moments: Moments | None = None) -> dict[str, Tensor]:
        stored = encode_by_rows(self._encode_rows, weight, CHUNK)
        if self.double_quant:
            mean = stored["absmax"].view(-1).mean(0, keepdim=True)
            table = dynamic_table(weight.device)
            stored["absmax"], nested = OPS.quantize_blockwise.default(stored["absmax"] - mean, table, NESTED)
            stored |= {"nested_absmax": nested, "absmax_mean": mean}
        return stored

    def decode(self, data: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return self.decode_rows(data, slice(None), shape)

    def decode_rows(self, data: dict[str, Tensor], index: Tensor | slice, shape: tuple[int, int]) -> Tensor:
        codes, absmax = data["codes"][index], self._absmax(data, index)
        if self.type == "int8":
            return OPS.int8_vectorwise_dequant.default(codes, absmax)  # type: ignore[no-any-return]
        (rows, blocks), columns = absmax.shape, shape[1]
        missing = blocks * self.blocksize // 2 - codes.shape[1]
        if missing:
            codes = F.pad(codes, (0, missing))
        # One row a block: the CPU kernel misplaces the scales of a row that is no whole number of blocks.
        size = (rows * blocks, self.blocksize)
        values = OPS.dequantize_4bit.default(
            codes.reshape(-1, 1), absmax.reshape(-1), self.blocksize, self.type, size, torch.float32
        )
        return values.view(rows, blocks * self.blocksize)[:, :columns]  # type: ignore[no-any-return]

    def linear(self, x: Tensor, data: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        if x.is_cuda and self._fits_fused(x, shape):
            return self._fused(x, data, shape)
        if torch.compiler.is_compiling():
            return super().linear(x, data, shape)
        return linear_by_rows(self, x, data, shape)

    def _fits_fused(self, x: Tensor, shape: tuple[int, int]) -> bool:
        whole_blocks = self.type != "int8" and shape[1] % self.blocksize == 0
        return whole_blocks and x.numel() > 0 and x.dtype in (torch.float32, torch.bfloat16, torch.float16)

    def _fused(self, x: Tensor, data: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """`linear` by bitsandbytes' own product with the packed codes."""
        absmax = self._absmax(data, slice(None)).reshape(-1)
        return OPS.gemm_4bit.default(x, data["codes"].view(-1, 1), shape, absmax, self.blocksize, self.type)  # type: ignore[no-any-return]

    def _absmax(self, data: dict[str, Tensor], index: Tensor | slice) -> Tensor:
        """The scales in fp32 of the rows `index`: `[n, blocks]`, of int8 `[n]`."""
        absmax = data["absmax"][index]
        if not self.double_quant:
            return absmax
        rows, blocks = data["absmax"].shape
        position = torch.arange(rows, device=absmax.device)[index].unsqueeze(1) * blocks
        position = position + torch.arange(blocks, device=absmax.device)
        values = dynamic_table(absmax.device)[absmax.int()] * data["nested_absmax"][position // NESTED]
        return values + data["absmax_mean"]

    def _encode_rows(self, weight: Tensor) -> dict[str, Tensor]:
        rows, columns = weight.shape
        x = weight.float()
        if self.type == "int8":
            codes, absmax, _ = OPS.int8_vectorwise_quant.default(x.clamp(-FP16_MAX, FP16_MAX).half(), 0.0)
            return {"codes": codes, "absmax": absmax}
        blocks = -(-columns // self.blocksize)
        x = F.pad(x, (0, blocks * self.blocksize - columns))
        codes, absmax = OPS.quantize_4bit.default(x, self.blocksize, self.type, torch.uint8)
        return {"codes": codes.view(rows, -1)[:, : (columns + 1) // 2], "absmax": absmax.view(rows, blocks)}
