"""`tiled_linear` and `tiled_swiglu_quant`: the integer GEMM on weights that lie in tiles (see `tiles`).

value[t, n] = (sum_k codes[t, k] * weight[n, k]) * weight_scale[n] (* token_scale[t]) (+ bias[n])

The sum is exact in int32. The epilogue is float32, one rounding per operation and in the order written, in every
backend: results are equal bit for bit. `tiled_swiglu_quant` takes the rows of value in interleaved pairs (gate, up) and
returns codes = clamp(round(gate / (1 + exp(-gate)) * up)): the step of its consumer is part of the scale of `up`.
"""

import torch
from torch import Tensor

from mergequant.grids import IntegerGrid
from mergequant.ops import backends
from mergequant.ops._register import register_op
from mergequant.ops._validate import ACTIVATION_BITS, FLOAT_DTYPES, require, require_codes, require_float
from mergequant.ops.int_matmul import int_matmul
from mergequant.ops.tiles import GROUP, tile_shape, untile_weight

__all__ = ["LARGEST_WIDTH", "tiled_linear", "tiled_swiglu_quant"]

LARGEST_WIDTH = 130_000  # 128 * 128 * width, the largest sum (of 16 * code * x at 4 bits, too), stays below 2^31
KERNEL_DTYPES = (torch.bfloat16, torch.float16)  # what the CUDA kernels write


@register_op
def tiled_linear(
    codes: Tensor,
    tiles: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    out_dtype: torch.dtype,
) -> Tensor:
    """Linear layer on integer codes and tiled weights.

    Args:
        codes: int8 (..., width).
        tiles: uint8, of `tile_weight(weight (outputs, width), weight_bits)`.
        weight_scale: float32 (outputs,).
        token_scale: optional float32 (..., 1), of dynamic inputs.
        bias: optional float (outputs,).
        weight_bits: 4 or 8, as the tiles were made.
        out_dtype: float dtype of the result.

    Returns:
        (..., outputs) in `out_dtype`.

    Raises:
        KernelError: a dtype, shape or device that is not as above.
    """
    _check("tiled_linear", codes, tiles, weight_scale, token_scale, bias, weight_bits)
    require(out_dtype in FLOAT_DTYPES, lambda: f"tiled_linear: out_dtype is {out_dtype}; pass one of {FLOAT_DTYPES}")
    rows, scales, offset = _flat(codes, token_scale, bias)
    shape = (*codes.shape[:-1], weight_scale.shape[0])
    if rows.shape[0] == 0:
        return codes.new_empty(shape, dtype=out_dtype)
    backend = backends.choose("tiled_linear", codes.device)
    if backend == "cuda" and out_dtype not in KERNEL_DTYPES:
        backends.report_fallback("tiled_linear", f"the CUDA kernels write bfloat16 and float16, not {out_dtype}")
        backend = "torch"
    if backend == "cuda":
        from mergequant.ops.cuda import gemm

        result = gemm.linear(rows, tiles, weight_scale, scales, offset, weight_bits, out_dtype)
    elif backend == "triton":
        from mergequant.ops.triton import tiled_gemm

        result = tiled_gemm.linear(rows, tiles, weight_scale, scales, offset, weight_bits, out_dtype)
    else:
        result = _values(rows, tiles, weight_scale, scales, offset, weight_bits).to(out_dtype)
    return result.view(shape)


@register_op
def tiled_swiglu_quant(
    codes: Tensor,
    tiles: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    bits: int,
) -> Tensor:
    """Gate and up projection in one, SwiGLU, and the codes of the down projection's input.

    Args:
        codes: int8 (..., width).
        tiles: uint8, of `tile_weight(interleave_rows(gate, up), weight_bits)`.
        weight_scale: float32 (2 ffn,), interleaved like the rows; those of `up` hold 1 / step of the result.
        token_scale: optional float32 (..., 1).
        bias: optional float (2 ffn,), interleaved; that of `up` is in steps of the result, too.
        weight_bits: 4 or 8, as the tiles were made.
        bits: width of the clamp, 2..8.

    Returns:
        int8 codes (..., ffn).

    Raises:
        KernelError: a dtype, shape or device that is not as above.
    """
    _check("tiled_swiglu_quant", codes, tiles, weight_scale, token_scale, bias, weight_bits)
    outputs = weight_scale.shape[0]
    require(
        outputs % (2 * GROUP) == 0,
        lambda: (
            f"tiled_swiglu_quant: {outputs} rows are not groups of {GROUP} gate and {GROUP} up rows; "
            "use interleave_rows"
        ),
    )
    require(bits in ACTIVATION_BITS, lambda: f"tiled_swiglu_quant: bits is {bits}; allowed are {ACTIVATION_BITS}")
    rows, scales, offset = _flat(codes, token_scale, bias)
    shape = (*codes.shape[:-1], outputs // 2)
    if rows.shape[0] == 0:
        return codes.new_empty(shape)
    backend = backends.choose("tiled_swiglu_quant", codes.device)
    if backend == "cuda":
        from mergequant.ops.cuda import gemm

        result = gemm.swiglu_quant(rows, tiles, weight_scale, scales, offset, weight_bits, bits)
    elif backend == "triton":
        from mergequant.ops.triton import tiled_gemm

        result = tiled_gemm.swiglu_quant(rows, tiles, weight_scale, scales, offset, weight_bits, bits)
    else:
        value = _values(rows, tiles, weight_scale, scales, offset, weight_bits)
        gate, up = value.view(-1, outputs // (2 * GROUP), 2, GROUP).unbind(2)
        product = gate / (1 + torch.exp(-gate)) * up
        result = IntegerGrid(bits).nearest(product).to(torch.int8)
    return result.view(shape)


@tiled_linear.register_fake
def _(
    codes: Tensor,
    tiles: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    out_dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], weight_scale.shape[0]), dtype=out_dtype)


@tiled_swiglu_quant.register_fake
def _(
    codes: Tensor,
    tiles: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
    bits: int,
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], weight_scale.shape[0] // 2))


def _flat(
    codes: Tensor, token_scale: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Codes (rows, width), token scales (rows,) and a float32 bias, all contiguous."""
    rows = codes.reshape(-1, codes.shape[-1]).contiguous()
    scales = None if token_scale is None else token_scale.reshape(-1).contiguous()
    return rows, scales, None if bias is None else bias.float().contiguous()


def _values(
    rows: Tensor, tiles: Tensor, weight_scale: Tensor, token_scale: Tensor | None, bias: Tensor | None, weight_bits: int
) -> Tensor:
    """The reference: float32 (rows, outputs)."""
    weight = untile_weight(tiles, weight_scale.shape[0], rows.shape[1], weight_bits)
    value = int_matmul(rows, weight).float().mul_(weight_scale)
    if token_scale is not None:
        value.mul_(token_scale[:, None])
    return value if bias is None else value.add_(bias)


def _check(
    op: str,
    codes: Tensor,
    tiles: Tensor,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    weight_bits: int,
) -> None:
    require_codes(op, "codes", codes)
    require(codes.dim() >= 1 and codes.shape[-1] > 0, lambda: f"{op}: codes {tuple(codes.shape)} have no width")
    width = codes.shape[-1]
    require(width <= LARGEST_WIDTH, lambda: f"{op}: codes are {width} wide; int32 sums are exact up to {LARGEST_WIDTH}")
    require(weight_scale.dtype == torch.float32, lambda: f"{op}: weight_scale is {weight_scale.dtype}; pass float32")
    require(
        weight_scale.dim() == 1 and weight_scale.shape[0] > 0 and weight_scale.is_contiguous(),
        lambda: f"{op}: weight_scale {tuple(weight_scale.shape)} is not a contiguous (outputs,)",
    )
    outputs = weight_scale.shape[0]
    require(tiles.dtype == torch.uint8, lambda: f"{op}: tiles are {tiles.dtype}; pass the uint8 of tile_weight")
    wanted = tile_shape(outputs, width, weight_bits)
    require(
        tuple(tiles.shape) == wanted,
        lambda: (
            f"{op}: tiles {tuple(tiles.shape)} are not {wanted}, those of {outputs} outputs, codes {width} wide and "
            f"{weight_bits} bits; make them with tile_weight"
        ),
    )
    require(tiles.is_contiguous(), lambda: f"{op}: tiles are not contiguous; call .contiguous() once, at load time")
    require_same_device(op, codes, tiles=tiles, weight_scale=weight_scale, token_scale=token_scale, bias=bias)
    if token_scale is not None:
        shape = (*codes.shape[:-1], 1)
        require(token_scale.shape == shape, lambda: f"{op}: token_scale {tuple(token_scale.shape)} is not {shape}")
        require(token_scale.dtype == torch.float32, lambda: f"{op}: token_scale is {token_scale.dtype}; pass float32")
    if bias is not None:
        require(bias.shape == (outputs,), lambda: f"{op}: bias {tuple(bias.shape)} is not ({outputs},)")
        require_float(op, "bias", bias)


def require_same_device(op: str, codes: Tensor, **others: Tensor | None) -> None:
    """Every tensor given lies where `codes` lies."""
    for name, other in others.items():
        require(
            other is None or other.device == codes.device,
            lambda: f"{op}: {name} is on {None if other is None else other.device}, codes on {codes.device}",
        )
