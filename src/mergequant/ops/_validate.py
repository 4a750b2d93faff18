"""Checks that every op shares: each error names the op, the argument, what it is and what is allowed."""

import torch
from torch import Tensor

from mergequant.errors import KernelError

__all__ = ["require", "require_codes", "require_float", "require_quant_arguments", "require_vector"]

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ACTIVATION_BITS = (2, 3, 4, 5, 6, 7, 8)


def require(condition: bool, message: str) -> None:
    """Raise KernelError(message) unless the condition holds."""
    if not condition:
        raise KernelError(message)


def require_float(op: str, name: str, value: Tensor) -> None:
    """`value` is a float tensor with at least one axis."""
    require(value.dtype in FLOAT_DTYPES, f"{op}: {name} is {value.dtype}; pass one of {FLOAT_DTYPES}")
    require(value.dim() >= 1, f"{op}: {name} is a scalar; pass (..., width)")


def require_codes(op: str, name: str, value: Tensor) -> None:
    """`value` is an int8 tensor of codes."""
    require(value.dtype == torch.int8, f"{op}: {name} is {value.dtype}; pass int8 codes")


def require_vector(op: str, name: str, value: Tensor | None, width: int, like: Tensor, dtype: torch.dtype) -> None:
    """An optional vector of `width` elements of one dtype, on the device of `like`."""
    if value is None:
        return
    require(
        value.dim() == 1 and value.shape[0] in (1, width),
        f"{op}: {name} has shape {tuple(value.shape)}; pass ({width},) or (1,)",
    )
    require(value.dtype == dtype, f"{op}: {name} is {value.dtype}; pass {dtype}")
    require(value.device == like.device, f"{op}: {name} is on {value.device}, the input on {like.device}")


def require_quant_arguments(
    op: str, x: Tensor, multiplier: Tensor, index: Tensor | None, shift: Tensor | None, bits: int
) -> None:
    """What all quantizing ops share: float input, channel vectors of one width, known bits."""
    require_float(op, "x", x)
    require(bits in ACTIVATION_BITS, f"{op}: bits is {bits}; allowed are {ACTIVATION_BITS}")
    width = index.shape[0] if index is not None else x.shape[-1]
    require_vector(op, "multiplier", multiplier, width, x, torch.float32)
    require_vector(op, "shift", shift, width, x, torch.float32)
    if index is not None:
        require(index.dtype in (torch.int32, torch.int64), f"{op}: index is {index.dtype}; pass int32")
        require(index.dim() == 1, f"{op}: index has shape {tuple(index.shape)}; pass (width,)")
        require(index.device == x.device, f"{op}: index is on {index.device}, the input on {x.device}")
