"""`int4x4_linear`: linear layer of 4-bit codes and 4-bit weights, both packed two to a byte (`grids.packing`).

y[t, n] = (sum_k codes[t, k] * weight[n, k]) * weight_scale[n] (* token_scale[t]) (+ bias[n])

For GPUs with int4 tensor cores (sm_80, sm_86, sm_89), where it halves the bytes and doubles the rate of 8-bit codes.
Hopper has none: there codes in 8-bit containers (`tiled_linear`) are as fast, and this op runs on torch unless a test
asks for the emulated instruction. Its speed has not been measured on the hardware that it is for.
"""

import torch
from torch import Tensor

from mergequant.grids import unpack_codes
from mergequant.ops import backends
from mergequant.ops._register import register_op
from mergequant.ops._validate import FLOAT_DTYPES, require, require_float
from mergequant.ops.int_linear import int8_linear
from mergequant.ops.tiled_linear import KERNEL_DTYPES, LARGEST_WIDTH, require_same_device

__all__ = ["int4x4_linear"]


@register_op
def int4x4_linear(
    packed_codes: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """Linear layer on packed 4-bit codes.

    Args:
        packed_codes: uint8 (..., width / 2), low nibble first.
        packed_weight: uint8 (outputs, width / 2), low nibble first.
        weight_scale: float32 (outputs,).
        token_scale: optional float32 (..., 1), of dynamic inputs.
        bias: optional float (outputs,).
        out_dtype: float dtype of the result.

    Returns:
        (..., outputs) in `out_dtype`.

    Raises:
        KernelError: a dtype, shape or device that is not as above.
    """
    op = "int4x4_linear"
    _check(op, packed_codes, packed_weight, weight_scale, token_scale, bias, out_dtype)
    shape = (*packed_codes.shape[:-1], packed_weight.shape[0])
    if packed_codes.numel() == 0:
        return packed_codes.new_empty(shape, dtype=out_dtype)
    backend = backends.choose(op, packed_codes.device)
    if backend == "cuda" and out_dtype not in KERNEL_DTYPES:
        backends.report_fallback(op, f"the CUDA kernel writes bfloat16 and float16, not {out_dtype}")
        backend = "torch"
    offset = None if bias is None else bias.float().contiguous()
    if backend == "cuda":
        from mergequant.ops.cuda import gemm_s4

        rows = packed_codes.reshape(-1, packed_codes.shape[-1]).contiguous()
        scales = None if token_scale is None else token_scale.reshape(-1).contiguous()
        result = gemm_s4.linear(rows, packed_weight.contiguous(), weight_scale, scales, offset, out_dtype)
        return result.view(shape)
    codes, weight = unpack_codes(packed_codes, 4), unpack_codes(packed_weight, 4)
    return int8_linear(codes, weight, weight_scale, token_scale, offset, out_dtype)


@int4x4_linear.register_fake
def _(
    packed_codes: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return packed_codes.new_empty((*packed_codes.shape[:-1], packed_weight.shape[0]), dtype=out_dtype)


def _check(
    op: str,
    packed_codes: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> None:
    for name, value in (("packed_codes", packed_codes), ("packed_weight", packed_weight)):
        require(value.dtype == torch.uint8, lambda: f"{op}: {name} is {value.dtype}; pass the uint8 of pack_codes")
    require(
        packed_weight.dim() == 2 and packed_weight.numel() > 0,
        lambda: f"{op}: packed_weight {tuple(packed_weight.shape)} is not (outputs, width / 2)",
    )
    outputs, size = packed_weight.shape
    require(2 * size <= LARGEST_WIDTH, lambda: f"{op}: codes are {2 * size} wide; sums are exact up to {LARGEST_WIDTH}")
    require(
        packed_codes.dim() >= 1 and packed_codes.shape[-1] == size,
        lambda: f"{op}: packed_codes {tuple(packed_codes.shape)} do not end in {size} bytes",
    )
    require(weight_scale.dtype == torch.float32, lambda: f"{op}: weight_scale is {weight_scale.dtype}; pass float32")
    require(
        weight_scale.shape == (outputs,) and weight_scale.is_contiguous(),
        lambda: f"{op}: weight_scale {tuple(weight_scale.shape)} is not a contiguous ({outputs},)",
    )
    others = {"packed_weight": packed_weight, "weight_scale": weight_scale, "token_scale": token_scale, "bias": bias}
    require_same_device(op, packed_codes, **others)
    if token_scale is not None:
        wanted = (*packed_codes.shape[:-1], 1)
        require(token_scale.shape == wanted, lambda: f"{op}: token_scale {tuple(token_scale.shape)} is not {wanted}")
        require(token_scale.dtype == torch.float32, lambda: f"{op}: token_scale is {token_scale.dtype}; pass float32")
    if bias is not None:
        require(bias.shape == (outputs,), lambda: f"{op}: bias {tuple(bias.shape)} is not ({outputs},)")
        require_float(op, "bias", bias)
    require(out_dtype in FLOAT_DTYPES, lambda: f"{op}: out_dtype is {out_dtype}; pass one of {FLOAT_DTYPES}")
