"""CodebookLinear: a linear layer on float inputs whose weight is stored as indices into books of vectors."""

from typing import Any

import torch
from torch import Tensor

from mergequant import ops
from mergequant.errors import KernelError
from mergequant.grids import CodebookTensor
from mergequant.grids.codebook import packed_words, vectors_for
from mergequant.nn.base import QuantModule
from mergequant.nn.linear import InputQuantizer, QuantLinear, check_rotation
from mergequant.nn.sparse import OutlierStore
from mergequant.nn.spec import CodebookSpec, InputSpec, PartSpec

__all__ = ["CodebookLinear"]


class CodebookLinear(QuantLinear):
    """A linear layer in codebooks, for float inputs.

    Buffers:
        indices_0, indices_1, ...: int32 (words,), the packed indices of each part (`grids.pack_indices`), row by row of
            (vectors, columns).
        book_0, book_1, ...: float16 (groups, entries, vector).
        order: int16 (width,), low 16 bits of the column of each stored position; only if `spec.ordered`.
        bias: float32 (outputs,), optional.

    Modules:
        outliers: the sparse part; only if there are any.
    """

    spec: CodebookSpec
    order: Tensor | None

    def __init__(self, spec: CodebookSpec) -> None:
        QuantModule.__init__(self)
        self.spec = spec
        self._adopted, self._derived = None, None
        check_rotation(spec.input.rotation, spec.input.in_width)
        for number, part in enumerate(spec.parts):
            count = vectors_for(spec.outputs, part.vector) * part.columns
            words = packed_words(count, part.bits + part.residual_bits)
            self.register_buffer(f"indices_{number}", torch.zeros(words, dtype=torch.int32))
            book = torch.zeros((part.groups, part.entries, part.vector), dtype=torch.float16)
            self.register_buffer(f"book_{number}", book)
        width = spec.input.width
        self.register_buffer("order", torch.arange(width).to(torch.int16) if spec.ordered else None)
        self.register_buffer("bias", torch.zeros(spec.outputs, dtype=torch.float32) if spec.bias else None)
        self.outliers = OutlierStore(spec.outputs, spec.outliers) if spec.outliers else None
        self.input_quantizer = InputQuantizer(spec.input) if spec.input.per_channel else None

    @classmethod
    def of(cls, weight: CodebookTensor, spec: InputSpec, bias: bool) -> "CodebookLinear":
        """The layer that holds a weight, its bias still 0."""
        parts = tuple(
            PartSpec(part.columns, part.book.shape[2], part.bits, part.residual_bits, part.book.shape[0])
            for part in weight.parts
        )
        ordered, store = weight.order is not None, weight.outliers
        count = 0 if store is None else store.count
        layer = cls(CodebookSpec(weight.outputs, spec, bias=bias, parts=parts, ordered=ordered, outliers=count))
        for number, part in enumerate(weight.parts):
            layer.get_buffer(f"indices_{number}").copy_(part.packed())
            layer.get_buffer(f"book_{number}").copy_(part.book)
        if layer.order is not None and weight.order is not None:
            layer.order.copy_(weight.order.to(torch.int32))
        if layer.outliers is not None and store is not None:
            layer.outliers.hold(store)
        return layer

    def decoded_weight(self) -> Tensor:
        """Weight (outputs, width) in float32: what the indices stand for."""
        return ops.codebook_weight(*self._stored(), self.spec.outputs)

    def integer_weight(self) -> Tensor:
        """Raises KernelError: there are no integers to multiply."""
        raise KernelError("a layer in codebooks has no integer weight; read `decoded_weight`")

    def scale_rows(self, factor: Tensor, start: int, stop: int) -> None:
        """Raises KernelError: rows share the vectors of a book, so a factor for one of them has no place."""
        raise KernelError(
            "a layer in codebooks cannot take up a factor per row; transform all sites of a block before codebooks are "
            "made, and leave the inputs behind it in floating point or with a scale per token"
        )

    def _weight_only(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return ops.codebook_linear(self._prepared(x), *self._stored(), bias, self.spec.outputs)

    def _stored(self) -> tuple[list[Tensor], list[Tensor], list[int], Tensor | None, list[Tensor]]:
        """Indices, books, layout, order and outliers, as the op takes them."""
        numbers = range(len(self.spec.parts))
        indices = [self.get_buffer(f"indices_{number}") for number in numbers]
        books = [self.get_buffer(f"book_{number}") for number in numbers]
        layout = [value for part in self.spec.parts for value in (part.columns, part.bits, part.residual_bits)]
        store = self.outliers
        sparse = [] if store is None or store.pointers is None else [store.pointers, store.columns, store.values]
        return indices, books, layout, self.order, sparse

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def extra_repr(self) -> str:
        spec = self.spec
        parts = ", ".join(
            f"{part.columns} columns: {part.bits}{f'+{part.residual_bits}' if part.residual_bits else ''} bits for "
            f"{part.vector}"
            for part in spec.parts[:3]
        )
        more = f" and {len(spec.parts) - 3} more parts" if len(spec.parts) > 3 else ""
        sparse = f", {spec.outliers} outliers" if spec.outliers else ""
        return f"{spec.input.width} -> {spec.outputs}, {parts}{more}{sparse}, input {spec.input.kind}"
