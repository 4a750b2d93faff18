"""What the float ops share: the choice between torch and Triton, and packed codes."""

import torch
from torch import Tensor

from mergequant.ops import backends

__all__ = ["codes_like", "pack_pairs", "use_triton"]

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def use_triton(op: str, *inputs: Tensor | None) -> bool:
    """Whether an op runs its Triton kernel on these float inputs; float64 stays with torch, which is reported."""
    given = [tensor for tensor in inputs if tensor is not None]
    if backends.choose(op, given[0].device) != "triton":
        return False
    for tensor in given:
        if tensor.dtype not in KERNEL_DTYPES:
            backends.report_fallback(op, f"the Triton kernel takes {KERNEL_DTYPES}, not {tensor.dtype}: torch runs")
            return False
    return True


def pack_pairs(codes: Tensor) -> Tensor:
    """int8 codes (..., width) of at most 4 bits to uint8 (..., width / 2), even columns in the low nibbles.

    The layout of `grids.pack_codes` without its look at the values, which would stop a GPU and break a captured graph.
    """
    nibbles = codes.view(torch.uint8) & 0x0F
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def codes_like(x: Tensor, width: int, packed: bool = False) -> Tensor:
    """Uninitialised codes (..., width) for the tokens of x (..., any), or bytes (..., width / 2) if packed."""
    shape = (*x.shape[:-1], width // 2 if packed else width)
    return x.new_empty(shape, dtype=torch.uint8 if packed else torch.int8)
