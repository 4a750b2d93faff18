"""Integer GEMMs on tiled weights, sm_90a: few tokens go to `gemm_decode`, many to `gemm_prefill`.

Callers are the ops, which have checked their arguments.
"""

import torch
from torch import Tensor

from mergequant.errors import KernelError
from mergequant.ops.cuda import gemm_decode, gemm_prefill
from mergequant.ops.cuda.launch import multiprocessors

__all__ = ["decodes", "linear", "swiglu_quant"]

DECODE_TOKENS = 64  # up to here the decode kernels run (they would take 128) ...
CROWDED_TOKENS = 32  # ... but up to here only, if there are more blocks of outputs than multiprocessors
ALIGNMENT = 16  # bytes of a copy


def decodes(rows: int, outputs: int, processors: int) -> bool:
    """Whether `gemm_decode` is the faster one for (rows, width) codes and so many outputs.

    Measured on Llama-2-7B's layers: at 64 tokens it wins with 32 and 96 blocks of 128 outputs on 132 multiprocessors
    (but for 3 % at the widest input) and loses 6 % with 172; at 128 tokens the prefill kernel wins them all.
    """
    blocks = -(-outputs // gemm_decode.BLOCK_OUTPUTS)
    return rows <= (DECODE_TOKENS if blocks <= processors else CROWDED_TOKENS)


def linear(
    codes: Tensor,
    tiles: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """`tiled_linear`: codes (rows, width), token_scale (rows,), bias float32 (outputs,), all contiguous.

    Raises:
        KernelError: tiles that are not 16-byte aligned, or a kernel that cannot be compiled or launched.
    """
    codes = _aligned(codes, tiles)
    if decodes(codes.shape[0], weight_scale.shape[0], multiprocessors(codes.device)):
        return gemm_decode.linear(codes, tiles, weight_scale, token_scale, bias, weight_bits, out_dtype)
    return gemm_prefill.linear(codes, tiles, weight_scale, token_scale, bias, weight_bits, out_dtype)


def swiglu_quant(
    codes: Tensor,
    tiles: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    bits: int,
) -> Tensor:
    """`tiled_swiglu_quant`; arguments and errors as `linear`."""
    codes = _aligned(codes, tiles)
    if decodes(codes.shape[0], weight_scale.shape[0], multiprocessors(codes.device)):
        return gemm_decode.swiglu_quant(codes, tiles, weight_scale, token_scale, bias, weight_bits, bits)
    return gemm_prefill.swiglu_quant(codes, tiles, weight_scale, token_scale, bias, weight_bits, bits)


def _aligned(codes: Tensor, tiles: Tensor) -> Tensor:
    """Codes at an address that the copies can read; tiles are not copied for that, they are too large."""
    if tiles.data_ptr() % ALIGNMENT:
        raise KernelError(f"tiles start off a multiple of {ALIGNMENT} bytes; call .clone() on them once, at load time")
    return codes.clone() if codes.data_ptr() % ALIGNMENT else codes
