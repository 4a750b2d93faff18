"""`int8_linear` and `int4_linear`: one integer GEMM, one multiply per output row.

y[t, n] = sum_k codes[t, k] * weight[n, k] * weight_scale[n] (* token_scale[t]) (+ bias[n])

The sum is exact in int32; only the epilogue is floating point, in float32, one rounding per operation in the order
written. `int4_linear` takes packed weights and widens them on the way. Modules on a CPU prepare their weights once and
call `prepared_linear` (see `cpu_linear`), which gives the same bits.
"""

import torch
from torch import Tensor

from mergequant.grids import unpack_codes
from mergequant.ops._register import register_op
from mergequant.ops._validate import FLOAT_DTYPES, require, require_codes, require_float, require_vector
from mergequant.ops.int_matmul import int_matmul

__all__ = ["check_linear", "int4_linear", "int8_linear", "linear_rows"]

ROWS_AT_ONCE = 512  # keeps the int32 accumulators of one piece inside the cache


@register_op
def int8_linear(
    codes: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Linear layer on integer codes.

    Args:
        codes: int8 (..., width).
        weight: int8 (outputs, width).
        weight_scale: float32 (outputs,).
        token_scale: optional float32 (..., 1), of dynamic inputs.
        bias: optional float (outputs,).
        out_dtype: float dtype of the result.

    Returns:
        (..., outputs) in `out_dtype`.

    Raises:
        KernelError: a dtype, shape or device that is not as above.
    """
    require_codes("int8_linear", "weight", weight)
    _check_weight("int8_linear", codes, weight)
    outputs, width = weight.shape
    check_linear("int8_linear", codes, outputs, width, weight_scale, token_scale, bias, out_dtype)
    return linear_rows(codes, weight, weight_scale, token_scale, bias, out_dtype)


@register_op
def int4_linear(
    codes: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """As `int8_linear`, with weights packed two to a byte: uint8 (outputs, width // 2), low nibble first."""
    require(
        packed_weight.dtype == torch.uint8, lambda: f"int4_linear: packed_weight is {packed_weight.dtype}; pass uint8"
    )
    _check_weight("int4_linear", codes, packed_weight)
    outputs, packed_width = packed_weight.shape
    check_linear("int4_linear", codes, outputs, 2 * packed_width, weight_scale, token_scale, bias, out_dtype)
    return linear_rows(codes, unpack_codes(packed_weight, 4), weight_scale, token_scale, bias, out_dtype)


@int8_linear.register_fake
@int4_linear.register_fake
def _(
    codes: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=out_dtype)


def linear_rows(
    codes: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`int8_linear` of arguments that have been checked."""
    rows = codes if codes.dim() == 2 else codes.reshape(-1, codes.shape[-1])
    rows = rows.contiguous()
    scales = None if token_scale is None else token_scale.reshape(-1, 1)
    count, outputs = rows.shape[0], weight.shape[0]
    if codes.device.type != "cpu" or count <= ROWS_AT_ONCE:
        result = _piece(rows, weight, weight_scale, scales, bias).to(out_dtype)
    else:
        result = torch.empty((count, outputs), dtype=out_dtype)
        for start in range(0, count, ROWS_AT_ONCE):
            piece = slice(start, start + ROWS_AT_ONCE)
            own = None if scales is None else scales[piece]
            result[piece] = _piece(rows[piece], weight, weight_scale, own, bias)
    return result if codes.dim() == 2 else result.reshape((*codes.shape[:-1], outputs))


def _piece(
    rows: Tensor, weight: Tensor, weight_scale: Tensor, token_scale: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Exact product and float32 epilogue of some rows (rows, outputs)."""
    value = int_matmul(rows, weight).float().mul_(weight_scale)
    if token_scale is not None:
        value.mul_(token_scale)
    return value if bias is None else value.add_(bias)


def _check_weight(op: str, codes: Tensor, weight: Tensor) -> None:
    if weight.dim() != 2 or weight.device != codes.device:
        require(weight.dim() == 2, lambda: f"{op}: weight has shape {tuple(weight.shape)}; pass (outputs, width)")
        require(weight.device == codes.device, lambda: f"{op}: weight is on {weight.device}, codes on {codes.device}")


def check_linear(
    op: str,
    codes: Tensor,
    outputs: int,
    width: int,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    """Check what all integer linear layers share.

    Raises:
        KernelError: naming the argument and what is allowed.
    """
    if (  # nearly every call, in a third of the time that the explanations below take
        codes.dtype == torch.int8
        and codes.dim() >= 1
        and codes.shape[-1] == width
        and weight_scale.shape == (outputs,)
        and weight_scale.dtype == torch.float32
        and weight_scale.device == codes.device
        and token_scale is None
        and bias is None
        and out_dtype in FLOAT_DTYPES
    ):
        return
    require_codes(op, "codes", codes)
    require(
        codes.dim() >= 1 and codes.shape[-1] == width, lambda: f"{op}: codes {tuple(codes.shape)} do not end in {width}"
    )
    require(
        weight_scale.shape == (outputs,), lambda: f"{op}: weight_scale {tuple(weight_scale.shape)} is not ({outputs},)"
    )
    require_vector(op, "weight_scale", weight_scale, outputs, codes, torch.float32)
    if token_scale is not None:
        wanted = (*codes.shape[:-1], 1)
        require(token_scale.shape == wanted, lambda: f"{op}: token_scale {tuple(token_scale.shape)} is not {wanted}")
        require(token_scale.dtype == torch.float32, lambda: f"{op}: token_scale is {token_scale.dtype}; pass float32")
        require(
            token_scale.device == codes.device,
            lambda: f"{op}: token_scale is on {token_scale.device}, codes on {codes.device}",
        )
    if bias is not None:
        require(bias.shape == (outputs,), lambda: f"{op}: bias {tuple(bias.shape)} is not ({outputs},)")
        require_float(op, "bias", bias)
        require(bias.device == codes.device, lambda: f"{op}: bias is on {bias.device}, codes on {codes.device}")
    require(out_dtype in FLOAT_DTYPES, lambda: f"{op}: out_dtype is {out_dtype}; pass one of {FLOAT_DTYPES}")
