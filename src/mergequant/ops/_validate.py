"""Checks that every op shares: each error names the op, the argument, what it is and what is allowed."""

from collections.abc import Callable

import torch
from torch import Tensor

from mergequant.errors import KernelError

__all__ = [
    "require",
    "require_codes",
    "require_dynamic_arguments",
    "require_float",
    "require_packable",
    "require_pairs",
    "require_quant_arguments",
    "require_residual",
    "require_vector",
]

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ACTIVATION_BITS = (2, 3, 4, 5, 6, 7, 8)
MOST_PACKED_BITS = 4


def require(condition: bool, message: str | Callable[[], str]) -> None:
    """Raise KernelError(message) unless the condition holds.

    A message that has to be put together is given as a function: ops check at every call, and an engine that launches
    them from Python waits for that.
    """
    if not condition:
        raise KernelError(message if isinstance(message, str) else message())


def require_float(op: str, name: str, value: Tensor) -> None:
    """`value` is a float tensor with at least one axis."""
    require(value.dtype in FLOAT_DTYPES, lambda: f"{op}: {name} is {value.dtype}; pass one of {FLOAT_DTYPES}")
    require(value.dim() >= 1, lambda: f"{op}: {name} is a scalar; pass (..., width)")


def require_codes(op: str, name: str, value: Tensor) -> None:
    """`value` is an int8 tensor of codes."""
    require(value.dtype == torch.int8, lambda: f"{op}: {name} is {value.dtype}; pass int8 codes")


def require_vector(op: str, name: str, value: Tensor | None, width: int, like: Tensor, dtype: torch.dtype) -> None:
    """An optional vector of `width` elements of one dtype, on the device of `like`."""
    if value is None:
        return
    require(
        value.dim() == 1 and value.shape[0] in (1, width),
        lambda: f"{op}: {name} has shape {tuple(value.shape)}; pass ({width},) or (1,)",
    )
    require(value.dtype == dtype, lambda: f"{op}: {name} is {value.dtype}; pass {dtype}")
    require(value.device == like.device, lambda: f"{op}: {name} is on {value.device}, the input on {like.device}")


def require_quant_arguments(
    op: str,
    x: Tensor,
    multiplier: Tensor | None,
    index: Tensor | None,
    shift: Tensor | None,
    bits: int,
    packed: bool = False,
    channels: int | None = None,
) -> None:
    """What all quantizing ops share: float input, channel vectors of one width, known bits.

    `channels` is the number of values that codes are made of where that is not the width of `x`.
    """
    require_float(op, "x", x)
    require(bits in ACTIVATION_BITS, lambda: f"{op}: bits is {bits}; allowed are {ACTIVATION_BITS}")
    width = index.shape[0] if index is not None else x.shape[-1] if channels is None else channels
    require_vector(op, "multiplier", multiplier, width, x, torch.float32)
    require_vector(op, "shift", shift, width, x, torch.float32)
    if index is not None:
        require(index.dtype in (torch.int32, torch.int64), lambda: f"{op}: index is {index.dtype}; pass int32")
        require(index.dim() == 1, lambda: f"{op}: index has shape {tuple(index.shape)}; pass (width,)")
        require(index.device == x.device, lambda: f"{op}: index is on {index.device}, the input on {x.device}")
    if packed:
        require_packable(op, bits, width)


def require_dynamic_arguments(op: str, x: Tensor, clip_ratio: float, bits: int) -> None:
    """What ops with a scale per token share: float input, a share of the range to keep, known bits."""
    require_float(op, "x", x)
    require(x.shape[-1] > 0, lambda: f"{op}: x has shape {tuple(x.shape)}; a token without values has no largest one")
    require(bits in ACTIVATION_BITS, lambda: f"{op}: bits is {bits}; allowed are {ACTIVATION_BITS}")
    require(0 < clip_ratio <= 1, lambda: f"{op}: clip_ratio is {clip_ratio}; pass a value in (0, 1]")


def require_packable(op: str, bits: int, width: int) -> None:
    """Two codes fit a byte and fill it."""
    require(
        bits <= MOST_PACKED_BITS,
        lambda: f"{op}: packed codes of {bits} bits do not fit; pass bits of {MOST_PACKED_BITS}",
    )
    require(width % 2 == 0, lambda: f"{op}: packed needs an even width, not {width}; pad the index or do not pack")


def require_pairs(op: str, gate_up: Tensor) -> None:
    """`gate_up` is float, its last axis the gates and then as many ups."""
    require_float(op, "gate_up", gate_up)
    require(
        gate_up.shape[-1] % 2 == 0,
        lambda: f"{op}: gate_up has an odd width of {gate_up.shape[-1]}; pass the gates and then as many ups",
    )


def require_residual(op: str, x: Tensor | None, residual: Tensor) -> None:
    """`residual` is a float tensor that can be updated in place, and `x` of its shape is added to it."""
    require_float(op, "residual", residual)
    require(
        residual.is_contiguous(),
        lambda: f"{op}: residual has strides {residual.stride()}; it is updated in place, pass it contiguous",
    )
    if x is not None:
        require_float(op, "x", x)
        require(
            x.shape == residual.shape, lambda: f"{op}: x has shape {tuple(x.shape)}, residual {tuple(residual.shape)}"
        )
        require(x.device == residual.device, lambda: f"{op}: x is on {x.device}, residual on {residual.device}")
