"""`kronecker_transform` and `kronecker_dynamic_quant`: x times a Kronecker product of two small matrices, then codes.

FlatQuant (arXiv 2410.09426, section 3.1). The transformed values stay in float32 between the two. On a GPU the two
matrix products are torch's, in float32 (TF32 as the process has set it: off, unless somebody turns it on), and the
quantizer is the kernel of `dynamic_quant`.
"""

import torch
from torch import Tensor

from mergequant.ops._elementwise import codes_like, kernels_for
from mergequant.ops._register import register_op
from mergequant.ops._validate import require, require_dynamic_arguments, require_float
from mergequant.ops.dynamic_quant import quantize_tokens

__all__ = ["kronecker_dynamic_quant", "kronecker_transform"]


@register_op
def kronecker_transform(x: Tensor, left: Tensor, right: Tensor | None) -> Tensor:
    """x (left (x) right) along the last axis: left^T X right with X = x reshaped to (a, width / a).

    Args:
        x: (..., width) float.
        left: (a, a) float; a divides the width.
        right: (width / a, width / a) float, or None for the identity.

    Returns:
        (..., width), float32 (float64 if x is).

    Raises:
        KernelError: a dtype, shape or device that is not as above.
    """
    _require_factors("kronecker_transform", x, left, right)
    return _product(x, left, right)


@kronecker_transform.register_fake
def _(x: Tensor, left: Tensor, right: Tensor | None) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


@register_op
def kronecker_dynamic_quant(
    x: Tensor, left: Tensor, right: Tensor | None, clip_ratio: float, bits: int
) -> tuple[Tensor, Tensor]:
    """`dynamic_quant` of x (left (x) right).

    Args:
        x: (..., width) float.
        left, right: as in `kronecker_transform`.
        clip_ratio: fraction of the token's largest transformed magnitude that the grid covers, in (0, 1].
        bits: width of the clamp, 2..8.

    Returns:
        int8 codes (..., width), and float32 scales (..., 1).

    Raises:
        KernelError: a dtype, shape, device or value that is not as above.
    """
    require_dynamic_arguments("kronecker_dynamic_quant", x, clip_ratio, bits)
    _require_factors("kronecker_dynamic_quant", x, left, right)
    flat = _product(x, left, right).float()
    kernels = kernels_for("dynamic_quant", "dynamic_quant", flat)
    if kernels is not None:
        result: tuple[Tensor, Tensor] = kernels.dynamic_quant(flat, clip_ratio, bits, False)
        return result
    return quantize_tokens(flat, clip_ratio, bits)


@kronecker_dynamic_quant.register_fake
def _(x: Tensor, left: Tensor, right: Tensor | None, clip_ratio: float, bits: int) -> tuple[Tensor, Tensor]:
    return codes_like(x, x.shape[-1]), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _product(x: Tensor, left: Tensor, right: Tensor | None) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    grid = x.to(dtype).reshape(-1, left.shape[0], x.shape[-1] // left.shape[0])
    if right is not None:
        grid = grid @ right.to(dtype)
    return torch.matmul(left.to(dtype).t(), grid).reshape(x.shape)


def _require_factors(op: str, x: Tensor, left: Tensor, right: Tensor | None) -> None:
    require_float(op, "x", x)
    width = x.shape[-1]
    for name, factor in (("left", left), ("right", right)):
        if factor is None:
            continue
        require_float(op, name, factor)
        square = factor.dim() == 2 and factor.shape[0] == factor.shape[1] > 0
        require(square, lambda: f"{op}: {name} has shape {tuple(factor.shape)}; pass a square matrix")
        require(factor.device == x.device, lambda: f"{op}: {name} is on {factor.device}, the input on {x.device}")
    size = left.shape[0]
    require(width % size == 0, lambda: f"{op}: left has {size} rows, which do not divide the width {width}")
    other = width // size if right is None else right.shape[0]
    require(
        size * other == width,
        lambda: f"{op}: left has {size} rows, right {other}: the product must be the width {width}",
    )
