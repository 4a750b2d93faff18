"""The second-order sweep: columns are fixed one after the other, each one's error is pushed onto those not yet fixed.

"GPTQ: Accurate Post-training Compression for Generative Pretrained Transformers", arXiv 2210.17323, section 3 and
algorithm 1. The sweep knows nothing of grids: a callback maps a compensated column to its quantized values, so that
integer, vector, sparse and mixed-precision variants share it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant.errors import NumericsError, UsageError
from mergequant.solvers.columns import ColumnQuantizer, block_kernel

__all__ = ["InverseFactor", "invert_hessian", "sweep"]

GroupHook = Callable[[int, Tensor], None]
GroupKernel = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]

DAMPING_GROWTH = 3.0
LARGEST_DAMPING = 1e3


@dataclass(frozen=True)
class InverseFactor:
    """Upper Cholesky factor R of the inverse damped Hessian (H^-1 = R^T R), in sweep order.

    Attributes:
        factor: float32 (width, width).
        order: int64 (width,), original column of each position.
        dead: bool (width,), original columns whose input is always zero.
        damping: share of the mean diagonal that was added in the end.
        attempts: number of Cholesky factorizations it took (1 = the asked damping sufficed).
    """

    factor: Tensor
    order: Tensor
    dead: Tensor
    damping: float
    attempts: int


def invert_hessian(hessian: Tensor, *, damping: float = 0.01, activation_order: bool = True) -> InverseFactor:
    """Factor the inverse of a raw-sum Hessian (width, width).

    Dead columns get the mean of the other diagonal elements, so that they do not sway the damping. `damping` times the
    mean diagonal is added, and raised threefold until the factorization succeeds; the result says so.

    Raises:
        NumericsError: the Hessian is not finite, or no damping up to 1000 makes it positive definite.
    """
    if not torch.isfinite(hessian).all():
        bad = int((~torch.isfinite(hessian)).any(1).nonzero()[0])
        raise NumericsError(f"the Hessian is not finite at channel {bad}; check the inputs of this layer")
    work = hessian.double().clone()
    diagonal = torch.diagonal(work)
    dead = diagonal <= 0
    diagonal[dead] = diagonal[~dead].mean() if not bool(dead.all()) else 1.0
    width = work.shape[0]
    # A stable sort keeps equal diagonals in natural order, on every device.
    order = torch.argsort(diagonal, descending=True, stable=True) if activation_order else torch.arange(width)
    order = order.to(work.device)
    work = work[order][:, order]
    mean = torch.diagonal(work).mean()
    identity = torch.eye(width, dtype=work.dtype, device=work.device)
    attempts = 0
    while damping <= LARGEST_DAMPING:
        attempts += 1
        lower, failed = torch.linalg.cholesky_ex(work + damping * mean * identity)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return InverseFactor(upper.float(), order, dead, damping, attempts)
        damping = max(damping * DAMPING_GROWTH, 1e-6)
    raise NumericsError(f"the Hessian of {width} channels is not positive definite even with damping {damping:.0f}")


def sweep(
    weight: Tensor,
    inverse: InverseFactor,
    quantize_column: ColumnQuantizer,
    *,
    begin_group: GroupHook | None = None,
    group_size: int | None = None,
    fix_group: GroupKernel | None = None,
    block: int = 128,
) -> tuple[Tensor, Tensor]:
    """Quantize all columns of a weight (rows, width) in the order of `inverse`.

    Args:
        weight: float (rows, width); not modified.
        inverse: result of `invert_hessian`.
        quantize_column: called with the original column number and its compensated values (rows,); returns the values
            that the stored codes stand for. Of `GridColumns` a GPU takes a block at once.
        begin_group: called at every `group_size`-th position with the position and the compensated columns of the
            group (rows, group_size): a hook for grids that follow the compensated weights.
        group_size: positions per group for `begin_group`; it must divide `block`.
        fix_group: what `quantize_column` does for a whole group, once it has begun: called with the position, the
            compensated columns (group_size, rows), and the factor's part (group_size, group_size) of them; returns
            values and errors over pivots, (group_size, rows) each.
        block: columns updated together; the result does not depend on it up to rounding.

    Returns:
        Quantized values (rows, width) in original order, and the loss of every row (rows,): sum of err^2 / R_ii^2 / 2.

    Raises:
        UsageError: a group size that does not divide the block, so that a group would be torn.
    """
    if group_size is not None and block % group_size:
        raise UsageError(f"a block of {block} columns tears groups of {group_size}; make it a multiple")
    rows, width = weight.shape
    columns = weight.float().t()[inverse.order].contiguous()  # (width, rows): a column is one contiguous row
    columns[inverse.dead[inverse.order]] = 0.0
    result = torch.empty_like(columns)
    loss = torch.zeros(rows, device=weight.device)
    factor = inverse.factor
    numbers = inverse.order.tolist()
    at_once = block_kernel(quantize_column, columns, block) if begin_group is None else None
    if at_once is not None:
        kernel = at_once

        def fix_group(position: int, values: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
            pivots = torch.diagonal(own).contiguous()
            return kernel(numbers[position : position + values.shape[0]], values, -own.t(), pivots=pivots)

    size = block if begin_group is None or not group_size else group_size
    for start in range(0, width, block):
        stop = min(start + block, width)
        piece, local = columns[start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(piece)
        pivots = torch.diagonal(local).tolist() if fix_group is None else []
        for first in range(0, stop - start, size):
            last = min(first + size, stop - start)
            if begin_group is not None and group_size:
                begin_group(start + first, piece[first:last].t())
            if fix_group is not None:
                own = slice(first, last)
                result[start + first : start + last], errors[own] = fix_group(
                    start + first, piece[own], local[own, own]
                )
                piece[last:] -= local[own, last:].t() @ errors[own]
                continue
            for i in range(first, last):
                value = quantize_column(numbers[start + i], piece[i])
                result[start + i] = value
                errors[i] = (piece[i] - value) / pivots[i]
                piece[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1)
        loss += errors.square().sum(0) / 2
        if stop < width:
            columns[stop:] -= factor[start:stop, stop:].t() @ errors
    restored = torch.empty_like(result)
    restored[inverse.order] = result
    return restored.t().contiguous(), loss
