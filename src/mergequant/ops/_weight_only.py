"""What the weight-only ops share: which kernel multiplies, which decodes, and the order of the columns.

For few tokens a kernel reads the weight as it is stored, for more it is decoded and multiplied by torch. What decodes
leaves the columns in stored order, and inputs are put into it: they are the smaller matrix.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mergequant.errors import KernelError
from mergequant.grids.outliers import column_numbers
from mergequant.ops import backends

__all__ = ["choose_kernel", "decodes_by_triton", "multiply_stored", "places_of"]


def choose_kernel(op: str, x: Tensor, tokens: int, reason_against: Callable[[str], str | None]) -> str:
    """Backend whose kernel multiplies: "cuda", "triton", or "torch" to decode first. What is passed over is reported.

    Args:
        op: name of the op.
        x: its input.
        tokens: rows of it; without any, torch runs.
        reason_against: of a backend's name, why its kernel does not take these arguments; None if it does.

    Raises:
        KernelError: the CUDA backend is forced on a tensor of another device.
    """
    chosen = backends.choose(op, x.device)
    if chosen == "cuda" and not x.is_cuda:
        raise KernelError(
            f"{op}: its CUDA kernel is asked for, but the input is on {x.device}; move it, or ask for torch"
        )
    order = backends.BACKENDS[op]
    for name in order[order.index(chosen) : -1] if tokens else ():
        reason = reason_against(name) if name == chosen else backends.missing(name) or reason_against(name)
        if reason is None:
            return name
        backends.report_fallback(op, f"not {name}: {reason}")
    return order[-1]


def decodes_by_triton(op: str, x: Tensor) -> bool:
    """Whether a weight is decoded by the op's Triton kernel, not by torch."""
    chosen = backends.choose(op, x.device)
    return chosen == "triton" or (chosen == "cuda" and backends.missing("triton") is None)


def places_of(order: Tensor) -> Tensor:
    """int64 (width,): the stored position of each column, of the column of each stored position."""
    places = torch.empty(order.shape, dtype=torch.int64, device=order.device)
    return places.scatter_(0, column_numbers(order), torch.arange(order.shape[0], device=order.device))


def multiply_stored(x: Tensor, weight: Tensor, order: Tensor | None, bias: Tensor | None) -> Tensor:
    """x times the transposed weight (outputs, width), whose columns are in stored order."""
    inputs = x if order is None else x.index_select(-1, column_numbers(order))
    return nn.functional.linear(inputs, weight, bias)
