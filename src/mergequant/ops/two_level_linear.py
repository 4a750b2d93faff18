"""`two_level_linear`: a linear layer on integer codes whose weight is stored in two levels of integers (QServe).

weight[n, k] = (code[n, k] - zero[n, k / group]) * step[n, k / group]    int8, exact
y[t, n] = sum_k codes[t, k] * weight[n, k] * weight_scale[n] (* token_scale[t]) (+ bias[n])

The middle level is an int8 weight, so what follows is `int8_linear`, bit for bit. Modules widen their weights once and
multiply them as they do all others (`prepared_linear` on a CPU, `tiled_linear` with 8 bits on a GPU).
"""

import torch
from torch import Tensor

from mergequant.grids import unpack_codes
from mergequant.grids.two_level import TWO_LEVEL_BITS, middle_codes
from mergequant.ops._register import register_op
from mergequant.ops._validate import require
from mergequant.ops.int_linear import check_linear, linear_rows

__all__ = ["two_level_linear"]


@register_op
def two_level_linear(
    codes: Tensor,
    packed_weight: Tensor,
    group_scale: Tensor,
    group_zero: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """As `int8_linear`, with a weight in two levels.

    Args:
        codes: int8 (..., width).
        packed_weight: uint8 (outputs, width // 2), low nibble first.
        group_scale: uint8 (outputs, groups).
        group_zero: int8 (outputs, groups).
        weight_scale, token_scale, bias, out_dtype: as in `int8_linear`.

    Raises:
        KernelError: a dtype, shape or device that is not as above, or weights whose middle level no int8 holds.
    """
    name = "two_level_linear"
    require(packed_weight.dtype == torch.uint8, lambda: f"{name}: packed_weight is {packed_weight.dtype}; pass uint8")
    require(
        packed_weight.dim() == 2,
        lambda: f"{name}: packed_weight {tuple(packed_weight.shape)} is not (outputs, width / 2)",
    )
    outputs, width = packed_weight.shape[0], 2 * packed_weight.shape[1]
    groups = group_scale.shape[-1] if group_scale.dim() == 2 else 0
    for what, part, dtype in (("group_scale", group_scale, torch.uint8), ("group_zero", group_zero, torch.int8)):
        require(part.dtype == dtype, lambda: f"{name}: {what} is {part.dtype}; pass {dtype}")
        fits = part.shape == (outputs, groups) and groups > 0 and width % groups == 0
        require(
            fits,
            lambda: f"{name}: {what} {tuple(part.shape)} is not ({outputs}, groups) with groups that divide {width}",
        )
    for part in (packed_weight, group_scale, group_zero):
        require(part.device == codes.device, lambda: f"{name}: the weight is on {part.device}, codes on {codes.device}")
    check_linear(name, codes, outputs, width, weight_scale, token_scale, bias, out_dtype)
    weight = middle_codes(unpack_codes(packed_weight, TWO_LEVEL_BITS), group_scale, group_zero)
    return linear_rows(codes, weight, weight_scale, token_scale, bias, out_dtype)


@two_level_linear.register_fake
def _(
    codes: Tensor,
    packed_weight: Tensor,
    group_scale: Tensor,
    group_zero: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], packed_weight.shape[0]), dtype=out_dtype)
