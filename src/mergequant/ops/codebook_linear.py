"""`codebook_linear` and `codebook_weight`: a linear layer on floats whose weight is indices into books of vectors.

weight[v * vector + i, order[c]] = book[group(c), index(v, c), i] (+ book[group(c), 2^bits + residual(v, c), i])
                                                                                                       (+ outlier)

For few tokens a GPU reads the packed indices and looks vectors up in the books, which stay in its caches or in shared
memory: bits of the weight are then all that comes from memory. The CUDA kernel does so once for up to 8 tokens, the
Triton kernel once for each. Above `most_tokens` the weight is decoded by another Triton kernel, then multiplied, which
is reported once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mergequant.grids import Outliers, decode_columns, unpack_indices
from mergequant.grids.codebook import packed_words, vectors_for
from mergequant.grids.outliers import column_numbers, row_numbers
from mergequant.grids.sparse import restore_columns
from mergequant.ops._elementwise import KERNEL_DTYPES
from mergequant.ops._register import register_op
from mergequant.ops._validate import require, require_float
from mergequant.ops._weight_only import choose_kernel, decodes_by_triton, multiply_stored, places_of

__all__ = ["codebook_linear", "codebook_weight", "most_tokens"]

NAME = "codebook_linear"
PER_PART = 3  # numbers in `layout`: columns, bits, residual bits
# Tokens up to which each kernel runs. CUDA: of 1 to 32, the most at which it was faster than decoding first at all four
# shapes of Llama-2-7B on an H200 (`benchmarks/weight_only.py`, its run under benchmarks/results), by groups, vector,
# bits and residual bits of a weight of one part; layouts that were not measured have the least of these.
# The Triton kernel was not measured.
MEASURED_TOKENS = {(1, 4, 8, 0): 32, (1, 6, 12, 0): 16, (1, 8, 8, 8): 8}
MOST_TOKENS = {"cuda": min(MEASURED_TOKENS.values()), "triton": 2}


@register_op
def codebook_linear(
    x: Tensor,
    indices: Sequence[Tensor],
    books: Sequence[Tensor],
    layout: Sequence[int],
    order: Tensor | None,
    outliers: Sequence[Tensor],
    bias: Tensor | None,
    outputs: int,
) -> Tensor:
    """x W^T + bias with W in codebooks.

    Args:
        x: (..., width) float.
        indices: of each part, int32 (words,): `grids.pack_indices` of (vectors, columns).
        books: of each part, float16 (groups, entries, vector).
        layout: columns, bits and residual bits of each part, one after the other.
        order: optional int16 (width,), low 16 bits of the column of each position; None = natural.
        outliers: what is added, by rows (`grids.Outliers`): pointers int32 (outputs + 1,), columns int16 (count,),
            whose low 16 bits count and are not checked to lie in the row, values float16 (count,); or nothing.
        bias: optional (outputs,), of x's dtype.
        outputs: rows of the weight.

    Returns:
        (..., outputs) in x's dtype.

    Raises:
        KernelError: a dtype, shape or device that is not as above.
    """
    name = NAME
    require_float(name, "x", x)
    _check_weight(name, indices, books, layout, order, outliers, outputs)
    width = sum(layout[::PER_PART])
    require(x.shape[-1] == width, lambda: f"{name}: x has {x.shape[-1]} channels, the weight {width} columns")
    require(indices[0].device == x.device, lambda: f"{name}: the weight is on {indices[0].device}, x on {x.device}")
    if bias is not None:
        require(bias.shape == (outputs,), lambda: f"{name}: bias {tuple(bias.shape)} is not ({outputs},)")
        require(bias.dtype == x.dtype, lambda: f"{name}: bias is {bias.dtype}; pass {x.dtype}, as x is")
    tokens = x.numel() // width
    kernel = choose_kernel(NAME, x, tokens, lambda backend: _against(backend, x, books, layout, outliers, tokens))
    if kernel == "cuda":
        from mergequant.ops.cuda import codebook_linear as cuda

        return cuda.linear(x, indices, books, layout, order, bias, outputs)
    if kernel == "triton":
        from mergequant.ops.triton import codebook_linear as kernels

        return kernels.codebook_linear(x, indices, books, layout, order, outliers, bias, outputs)
    if decodes_by_triton(NAME, x):
        from mergequant.ops.triton import codebook_linear as kernels

        weight = kernels.decode(indices, books, layout, outputs, torch.float32 if outliers else x.dtype)
        if outliers:
            columns = column_numbers(outliers[1])
            places = columns if order is None else places_of(order)[columns]
            weight[row_numbers(outliers[0]), places] += outliers[2].float()
        return multiply_stored(x, weight.to(x.dtype), order, bias)
    return nn.functional.linear(x, _decoded(indices, books, layout, order, outliers, outputs).to(x.dtype), bias)


def most_tokens(backend: str, books: Sequence[Tensor], layout: Sequence[int]) -> int:
    """Tokens up to which a backend's kernel multiplies; above, decoding first is faster, or nobody has measured."""
    most = MOST_TOKENS[backend]
    return MEASURED_TOKENS.get((*books[0].shape[::2], *layout[1:]), most) if backend == "cuda" else most


def _against(
    backend: str, x: Tensor, books: Sequence[Tensor], layout: Sequence[int], outliers: Sequence[Tensor], tokens: int
) -> str | None:
    """Why a backend's kernel does not take these arguments; None if it does."""
    most = most_tokens(backend, books, layout)
    if tokens > most:
        return f"more than {most} tokens at once are multiplied with the decoded weight"
    if backend == "cuda":
        from mergequant.ops.cuda import codebook_linear as cuda

        return cuda.reason_against(x, books, layout, outliers)
    return None if x.dtype in KERNEL_DTYPES else f"the kernel takes {KERNEL_DTYPES}, not {x.dtype}"


@codebook_linear.register_fake
def _(
    x: Tensor,
    indices: Sequence[Tensor],
    books: Sequence[Tensor],
    layout: Sequence[int],
    order: Tensor | None,
    outliers: Sequence[Tensor],
    bias: Tensor | None,
    outputs: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


@register_op
def codebook_weight(
    indices: Sequence[Tensor],
    books: Sequence[Tensor],
    layout: Sequence[int],
    order: Tensor | None,
    outliers: Sequence[Tensor],
    outputs: int,
) -> Tensor:
    """The decoded weight, float32 (outputs, width); arguments as in `codebook_linear`. Raises KernelError."""
    _check_weight("codebook_weight", indices, books, layout, order, outliers, outputs)
    return _decoded(indices, books, layout, order, outliers, outputs)


@codebook_weight.register_fake
def _(
    indices: Sequence[Tensor],
    books: Sequence[Tensor],
    layout: Sequence[int],
    order: Tensor | None,
    outliers: Sequence[Tensor],
    outputs: int,
) -> Tensor:
    return books[0].new_empty((outputs, sum(layout[::PER_PART])), dtype=torch.float32)


def _decoded(
    indices: Sequence[Tensor],
    books: Sequence[Tensor],
    layout: Sequence[int],
    order: Tensor | None,
    outliers: Sequence[Tensor],
    outputs: int,
) -> Tensor:
    parts = []
    for number, (words, book) in enumerate(zip(indices, books)):
        columns, bits, residual_bits = layout[PER_PART * number : PER_PART * (number + 1)]
        vectors = vectors_for(outputs, book.shape[2])
        symbols = unpack_indices(words, bits + residual_bits, vectors * columns).reshape(vectors, columns)
        parts.append(decode_columns(symbols, book.float(), bits, residual_bits, outputs))
    stored = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    natural = restore_columns(stored, None if order is None else column_numbers(order))
    if outliers:
        Outliers(outliers[1], outliers[2], outliers[0]).add_to(natural)
    return natural


def _check_weight(
    op: str,
    indices: Sequence[Tensor],
    books: Sequence[Tensor],
    layout: Sequence[int],
    order: Tensor | None,
    outliers: Sequence[Tensor],
    outputs: int,
) -> None:
    require(outputs > 0 and len(indices) > 0, lambda: f"{op}: a weight of {outputs} outputs and {len(indices)} parts")
    require(
        len(indices) == len(books) and len(layout) == PER_PART * len(books),
        lambda: (
            f"{op}: {len(indices)} indices, {len(books)} books and {len(layout)} numbers of layout; "
            "pass 1, 1 and 3 a part"
        ),
    )
    for number, (words, book) in enumerate(zip(indices, books)):
        columns, bits, residual_bits = layout[PER_PART * number : PER_PART * (number + 1)]
        entries = (1 << bits) + (1 << residual_bits if residual_bits else 0)
        fits = book.dim() == 3 and book.shape[1] == entries and book.shape[0] > 0 and columns % book.shape[0] == 0
        require(
            fits,
            lambda: f"{op}: book {number} {tuple(book.shape)} is not (groups, {entries}, vector) for {columns} columns",
        )
        require(book.dtype == torch.float16, lambda: f"{op}: book {number} is {book.dtype}; pass float16")
        count = packed_words(vectors_for(outputs, book.shape[2]) * columns, bits + residual_bits)
        require(
            words.shape == (count,), lambda: f"{op}: indices {number} {tuple(words.shape)} are not ({count},) words"
        )
        require(words.dtype == torch.int32, lambda: f"{op}: indices {number} are {words.dtype}; pass int32")
        for part in (words, book):
            require(
                part.device == indices[0].device, lambda: f"{op}: part {number} is on {part.device}, others elsewhere"
            )
    if order is not None:
        width = sum(layout[::PER_PART])
        require(order.shape == (width,) and order.dtype == torch.int16, lambda: f"{op}: order is not int16 ({width},)")
        require(order.device == indices[0].device, lambda: f"{op}: order is on {order.device}, indices elsewhere")
    if outliers:
        kinds = [(part.dtype, part.dim()) for part in outliers]
        fits = kinds == [(torch.int32, 1), (torch.int16, 1), (torch.float16, 1)]
        require(fits, lambda: f"{op}: outliers are {kinds}; pass pointers int32, columns int16 and values float16")
        fits = outliers[0].shape == (outputs + 1,) and outliers[1].shape == outliers[2].shape
        require(
            fits,
            lambda: f"{op}: outliers of {[tuple(part.shape) for part in outliers]}; pass ({outputs + 1},) and counts",
        )
        require(
            all(part.device == indices[0].device for part in outliers), lambda: f"{op}: outliers are on another device"
        )
