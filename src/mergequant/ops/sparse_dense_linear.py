"""`sparse_dense_linear`: a weight-only linear layer on low-bit groups with zero points, and a sparse part beside them.

weight[n, order[k]] = (code[n, k] - zero[n, k / group]) * scale[n, k / group]      (+ outlier[n, order[k]])
y[t, n] = sum_j x[t, j] * weight[n, j] (+ bias[n])

Scales and zero points have 16 bits each, or are codes on a second-level grid that a tile of rows shares
(`grids/second_level.py`). The reference decodes the weight and multiplies. Kernels read codes and outliers as they are:
the CUDA one once for up to 16 tokens, the Triton one once for each. Above `MOST_TOKENS` tokens the weight is decoded,
by another Triton kernel, and multiplied by torch, which is reported once.
"""

import torch
from torch import Tensor, nn

from mergequant.grids import IntegerGrid, Outliers, unpack_stream
from mergequant.grids.bitstream import stream_width
from mergequant.grids.integer import SUPPORTED_BITS
from mergequant.grids.outliers import COLUMN_MASK
from mergequant.grids.quantizer import decode
from mergequant.grids.second_level import decode_statistics, tiles_of
from mergequant.grids.sparse import restore_columns
from mergequant.ops._register import register_op
from mergequant.ops._validate import require, require_float
from mergequant.ops._weight_only import choose_kernel, decodes_by_triton, multiply_stored, places_of

__all__ = ["MOST_TOKENS", "decode_sparse", "sparse_dense_linear"]

NAME = "sparse_dense_linear"
KERNEL_BITS = 4  # of a code as the kernel reads it: two share a byte
NIBBLE = 15
# Tokens up to which each kernel runs: the most at which it was faster than decoding first at all four shapes of
# Llama-2-7B on an H200, in groups of 16 with 0.5 % outliers. CUDA: of 1 to 32 (`benchmarks/weight_only.py`, its run
# under benchmarks/results). Triton: of 1 to 4, timed in another run than the decoding (docs/log.md, Kernels).
MOST_TOKENS = {"cuda": 32, "triton": 2}


@register_op
def sparse_dense_linear(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    statistics: Tensor | None,
    order: Tensor | None,
    pointers: Tensor | None,
    columns: Tensor | None,
    values: Tensor | None,
    bias: Tensor | None,
    bits: int,
    tile: int,
) -> Tensor:
    """x times the transposed weight, (..., outputs) in the dtype of x.

    Args:
        x: float (..., width).
        codes: uint8 (outputs, width * bits / 8), rows of bits (`grids.pack_stream`), 0 for the lowest code.
        scale: float16 (outputs, groups); with `statistics` uint8: low nibble a scale's code, high a zero's.
        zero: float16 (outputs, groups), in signed codes; None = 0, or with `statistics`.
        statistics: float16 (tiles, groups, 4): step and zero of the scales, step and zero of the zeros; or None.
        order: int16 (width,), low 16 bits of the channel that each code column meets; None = its own.
        pointers: int32 (outputs + 1,), where each row's outliers begin and end; None = none, or whole columns.
        columns: int16 (count,), low 16 bits of their columns; they are not checked to lie in the row.
        values: float16 (count,), what is added; of whole columns (outputs, count).
        bias: float (outputs,), or None.
        bits: bits of a code, 2..8.
        tile: rows that share second-level grids; 0 without.

    Raises:
        KernelError: a dtype, shape or device that is not as above.
    """
    require_float(NAME, "x", x)
    width = x.shape[-1]
    _check(x, codes, scale, zero, statistics, order, bits, tile, width)
    _check_outliers(x, codes.shape[0], pointers, columns, values)
    if bias is not None:
        require(bias.shape == (codes.shape[0],), lambda: f"{NAME}: bias {tuple(bias.shape)} is not (outputs,)")
    tokens = x.numel() // max(width, 1)
    kernel = choose_kernel(
        NAME, x, tokens, lambda name: _against(name, x, codes, scale, pointers, columns, bits, tile, tokens)
    )
    if kernel == "cuda":
        from mergequant.ops.cuda import sparse_dense as cuda

        return cuda.linear(x, codes, scale, zero, statistics, order, pointers, columns, values, bias, tile)
    if kernel == "triton":
        from mergequant.ops.triton import sparse_dense

        return sparse_dense.linear(x, codes, scale, zero, statistics, order, pointers, columns, values, bias, tile)
    own = None if bias is None else bias.to(x.dtype)
    if decodes_by_triton(NAME, x):
        from mergequant.ops.triton import sparse_dense

        places = None if order is None else places_of(order)
        parts = (codes, scale, zero, statistics, places, pointers, columns, values)
        return multiply_stored(x, sparse_dense.decode(*parts, bits, tile, width, x.dtype), order, own)
    weight = decode_sparse(codes, scale, zero, statistics, order, pointers, columns, values, bits, tile, width)
    return nn.functional.linear(x, weight.to(x.dtype), own)


@sparse_dense_linear.register_fake
def _(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    statistics: Tensor | None,
    order: Tensor | None,
    pointers: Tensor | None,
    columns: Tensor | None,
    values: Tensor | None,
    bias: Tensor | None,
    bits: int,
    tile: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def decode_sparse(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    statistics: Tensor | None,
    order: Tensor | None,
    pointers: Tensor | None,
    columns: Tensor | None,
    values: Tensor | None,
    bits: int,
    tile: int,
    width: int,
) -> Tensor:
    """The weight, float32 (outputs, width), of arguments as in `sparse_dense_linear`: `SparseTensor.decode`'s bits."""
    if statistics is not None:
        zero = decode_statistics(scale >> KERNEL_BITS, statistics[..., 2:], tile)
        scale = decode_statistics(scale & NIBBLE, statistics[..., :2], tile)
    signed = unpack_stream(codes, width, bits) + IntegerGrid(bits).low
    dense = decode(signed.float(), scale.float(), None if zero is None else zero.float())
    dense = restore_columns(dense, None if order is None else order.to(torch.int64) & COLUMN_MASK)
    return dense if columns is None or values is None else Outliers(columns, values, pointers).add_to(dense)


def _against(
    name: str,
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    pointers: Tensor | None,
    columns: Tensor | None,
    bits: int,
    tile: int,
    tokens: int,
) -> str | None:
    """Why a backend's kernel does not take these arguments; None if it does."""
    if tokens > MOST_TOKENS[name]:
        return f"more than {MOST_TOKENS[name]} tokens at once are multiplied with the decoded weight"
    if name == "cuda":
        from mergequant.ops.cuda import sparse_dense as cuda

        return cuda.reason_against(x, codes, scale, pointers, columns, bits, tile)
    group = x.shape[-1] // scale.shape[1]
    if bits != KERNEL_BITS:
        return f"the kernel reads codes of {KERNEL_BITS} bits, not {bits}"
    if group < 4 or group & (group - 1):
        return f"the kernel wants groups of a power of two from 4 on, not {group}"
    whole = columns is not None and pointers is None
    return "the kernel reads outliers row by row, not whole columns" if whole else None


def _check(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    statistics: Tensor | None,
    order: Tensor | None,
    bits: int,
    tile: int,
    width: int,
) -> None:
    require(bits in SUPPORTED_BITS, lambda: f"{NAME}: bits is {bits}; allowed are {SUPPORTED_BITS}")
    require(codes.dtype == torch.uint8 and codes.dim() == 2, lambda: f"{NAME}: codes must be uint8 (outputs, bytes)")
    outputs = codes.shape[0]
    need = stream_width(width, bits)
    require(
        codes.shape[1] == need,
        lambda: f"{NAME}: codes: {codes.shape[1]} bytes a row; {width} of {bits} bits take {need}",
    )
    groups = scale.shape[-1] if scale.dim() == 2 else 0
    fits = scale.shape == (outputs, groups) and groups > 0 and width % groups == 0
    require(
        fits, lambda: f"{NAME}: scale {tuple(scale.shape)} is not ({outputs}, groups) with groups that divide {width}"
    )
    dtype = torch.float16 if statistics is None else torch.uint8
    require(scale.dtype == dtype, lambda: f"{NAME}: scale is {scale.dtype}; pass {dtype}")
    if zero is not None:
        fits = statistics is None and zero.shape == scale.shape and zero.dtype == torch.float16
        require(fits, lambda: f"{NAME}: zero {zero.dtype} {tuple(zero.shape)} is not float16 and shaped like scale")
    if statistics is not None:
        require(tile > 0, lambda: f"{NAME}: tile is {tile}; statistics need the rows that share them")
        shape = (tiles_of(outputs, tile), groups, 4)
        fits = statistics.shape == shape and statistics.dtype == torch.float16
        require(
            fits, lambda: f"{NAME}: statistics {statistics.dtype} {tuple(statistics.shape)} are not float16 {shape}"
        )
    if order is not None:
        fits = order.dtype == torch.int16 and order.shape == (width,)
        require(fits, lambda: f"{NAME}: order {order.dtype} {tuple(order.shape)} is not int16 ({width},)")
    for part in (codes, scale, zero, statistics, order):
        same = part is None or part.device == x.device
        require(same, lambda: f"{NAME}: the weight is on {codes.device}, the input on {x.device}")


def _check_outliers(
    x: Tensor, outputs: int, pointers: Tensor | None, columns: Tensor | None, values: Tensor | None
) -> None:
    together = (columns is None) == (values is None) and not (columns is None and pointers is not None)
    require(together, lambda: f"{NAME}: outliers have columns and values, and pointers unless they are whole columns")
    if columns is None or values is None:
        return
    fits = columns.dtype == torch.int16 and columns.dim() == 1
    require(fits, lambda: f"{NAME}: columns {columns.dtype} {tuple(columns.shape)} are not int16 (count,)")
    shape = (outputs, columns.shape[0]) if pointers is None else (columns.shape[0],)
    fits = values.dtype == torch.float16 and values.shape == shape
    require(fits, lambda: f"{NAME}: values {values.dtype} {tuple(values.shape)} are not float16 {shape}")
    if pointers is not None:
        fits = pointers.dtype == torch.int32 and pointers.shape == (outputs + 1,)
        require(
            fits, lambda: f"{NAME}: pointers {pointers.dtype} {tuple(pointers.shape)} are not int32 ({outputs + 1},)"
        )
    for part in (pointers, columns, values):
        same = part is None or part.device == x.device
        require(same, lambda: f"{NAME}: outliers are on {columns.device}, the input on {x.device}")
