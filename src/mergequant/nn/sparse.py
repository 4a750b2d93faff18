"""SparseLinear: a weight-only linear layer in small groups, whose statistics may be quantized, beside outliers."""

from typing import Any

import torch
from torch import Tensor

from mergequant import ops
from mergequant.errors import KernelError
from mergequant.grids import IntegerGrid, Outliers, SparseTensor, pack_stream, stream_width, unpack_stream
from mergequant.grids.second_level import tiles_of
from mergequant.nn.base import QuantModule
from mergequant.nn.linear import InputQuantizer, QuantLinear, check_rotation
from mergequant.nn.spec import InputSpec, SparseSpec
from mergequant.ops.sparse_dense_linear import KERNEL_BITS

__all__ = ["OutlierStore", "SparseLinear"]

Optional = Tensor | None


class OutlierStore(QuantModule):
    """The sparse part of a weight (`grids.Outliers`): what is added to its dense part.

    Buffers:
        columns: int16 (count,), low 16 bits of the columns.
        values: float16 (count,); of whole columns (outputs, count).
        pointers: int32 (outputs + 1,), where each row's values begin and end; not with whole columns.
    """

    columns: Tensor
    values: Tensor
    pointers: Tensor | None

    def __init__(self, outputs: int, count: int, whole: bool = False) -> None:
        super().__init__()
        self.register_buffer("columns", torch.zeros(count, dtype=torch.int16))
        self.register_buffer("values", torch.zeros((outputs, count) if whole else count, dtype=torch.float16))
        self.register_buffer("pointers", None if whole else torch.zeros(outputs + 1, dtype=torch.int32))

    def hold(self, outliers: Outliers) -> None:
        """Take the tensors of a weight's outliers."""
        self.columns.copy_(outliers.columns)
        self.values.copy_(outliers.values)
        if self.pointers is not None and outliers.pointers is not None:
            self.pointers.copy_(outliers.pointers)


class SparseLinear(QuantLinear):
    """A linear layer in groups with outliers, for float inputs.

    Buffers:
        weight_codes: uint8 (outputs, bytes), rows of `weight_bits`-bit codes (`grids.pack_stream`), in stored order.
        weight_scale: float16 (outputs, groups), without a second level.
        weight_zero: float16 (outputs, groups), in signed codes, without a second level and with zeros.
        statistic_codes: uint8 (2, outputs, bytes), rows of second-level codes of scales, and of zeros.
        statistics: float16 (tiles, groups, 4), step and zero of the scales, step and zero of the zeros.
        order: int16 (width,), low 16 bits of the channel of each stored column; only if `spec.ordered`.
        bias: float32 (outputs,), optional.

    Modules:
        outliers: the sparse part; only if there are any.
    """

    spec: SparseSpec
    weight_scale: Tensor | None  # type: ignore[assignment]
    statistic_codes: Tensor | None
    statistics: Tensor | None
    order: Tensor | None

    def __init__(self, spec: SparseSpec) -> None:
        QuantModule.__init__(self)
        self.spec = spec
        self._adopted, self._derived = None, None
        check_rotation(spec.input.rotation, spec.input.in_width)
        outputs, groups, tile = spec.outputs, spec.groups, spec.tile
        plain = torch.float16
        codes = stream_width(spec.input.width, spec.weight_bits)
        self.register_buffer("weight_codes", torch.zeros(outputs, codes, dtype=torch.uint8))
        self.register_buffer("weight_scale", None if tile else torch.ones(outputs, groups, dtype=plain))
        zeros = spec.zeros == "float" and not tile
        self.register_buffer("weight_zero", torch.zeros(outputs, groups, dtype=plain) if zeros else None)
        coded = (2, outputs, stream_width(groups, spec.statistic_bits)) if tile else ()
        self.register_buffer("statistic_codes", torch.zeros(coded, dtype=torch.uint8) if tile else None)
        grids = (tiles_of(outputs, tile), groups, 4) if tile else ()
        self.register_buffer("statistics", torch.zeros(grids, dtype=plain) if tile else None)
        self.register_buffer("order", torch.zeros(spec.input.width, dtype=torch.int16) if spec.ordered else None)
        self.register_buffer("bias", torch.zeros(outputs, dtype=torch.float32) if spec.bias else None)
        self.outliers = OutlierStore(outputs, spec.outliers, spec.whole_columns) if spec.outliers else None
        self.input_quantizer = InputQuantizer(spec.input) if spec.input.per_channel else None

    @classmethod
    def of(cls, weight: SparseTensor, spec: InputSpec, bias: bool) -> "SparseLinear":
        """The layer that holds a weight, its bias still 0."""
        rows, width = weight.codes.shape
        groups = weight.scale.shape[1]
        store = weight.outliers
        layer = cls(
            SparseSpec(
                rows,
                spec,
                weight.grid.bits,
                width // groups if groups > 1 else 0,
                bias,
                zeros="none" if weight.zero is None else "float",
                outliers=0 if store is None else store.count,
                whole_columns=store is not None and store.pointers is None,
                tile=weight.tile,
                statistic_bits=weight.statistic_bits or 3,
                ordered=weight.order is not None,
            )
        )
        layer.get_buffer("weight_codes").copy_(pack_stream(weight.codes.int() - weight.grid.low, weight.grid.bits))
        if layer.weight_scale is not None:
            layer.weight_scale.copy_(weight.scale)
        if layer.weight_zero is not None and weight.zero is not None:
            layer.weight_zero.copy_(weight.zero)
        if layer.statistic_codes is not None and weight.statistic_codes is not None:
            layer.statistic_codes.copy_(pack_stream(weight.statistic_codes, weight.statistic_bits))
        if layer.statistics is not None and weight.statistics is not None:
            layer.statistics.copy_(weight.statistics)
        if layer.order is not None and weight.order is not None:
            layer.order.copy_(weight.order.to(torch.int32))
        if layer.outliers is not None and store is not None:
            layer.outliers.hold(store)
        return layer

    def decoded_weight(self) -> Tensor:
        """Weight (outputs, width) in float32, outliers included."""
        codes, scale, bits = self._parts(self.spec.weight_bits)
        return ops.decode_sparse(codes, scale, *self._rest(), bits, self.spec.tile, self.spec.input.width)

    def integer_weight(self) -> Tensor:
        """Raises KernelError: there are no integers to multiply."""
        raise KernelError("a layer with zero points and outliers has no integer weight; read `decoded_weight`")

    def scale_rows(self, factor: Tensor, start: int, stop: int) -> None:
        """Raises KernelError: rows share second-level grids, and outliers are sums, so a factor has no exact place."""
        raise KernelError(
            "a layer with outliers cannot take up a factor per row; transform all sites of a block before its weights "
            "are rounded, and leave the inputs behind it in floating point or with a scale per token"
        )

    def _weight_only(self, x: Tensor) -> Tensor:
        # The kernel reads codes of 4 bits; narrower ones are widened once, on a GPU.
        bits = max(self.spec.weight_bits, KERNEL_BITS) if x.is_cuda else self.spec.weight_bits
        codes, scale, bits = self._parts(bits)
        return ops.sparse_dense_linear(self._prepared(x), codes, scale, *self._rest(), self.bias, bits, self.spec.tile)

    def _rest(self) -> tuple[Optional, Optional, Optional, Optional, Optional, Optional]:
        """Zeros, statistics, order and outliers, as the op takes them."""
        store = self.outliers
        if store is None:
            return self.weight_zero, self.statistics, self.order, None, None, None
        return self.weight_zero, self.statistics, self.order, store.pointers, store.columns, store.values

    def _parts(self, bits: int) -> tuple[Tensor, Tensor, int]:
        """Codes of `bits` bits, and scales as the op takes them: made at first use and kept, anew when they change."""
        codes, statistic_codes = self.weight_codes, self.statistic_codes
        version = sum(0 if part is None or part.is_inference() else part._version for part in (codes, statistic_codes))
        known = self._derived
        if known is not None and known[0] is codes and known[1] == version and known[2][2] == bits:
            made: tuple[Tensor, Tensor, int] = known[2]
            return made
        scale, source = self.weight_scale, codes
        if statistic_codes is not None:
            both = unpack_stream(statistic_codes, self.spec.groups, self.spec.statistic_bits)
            scale = (both[0] | both[1] << KERNEL_BITS).to(torch.uint8)
        if scale is None:
            raise KernelError("a layer without scales; load its checkpoint anew")
        if bits != self.spec.weight_bits:
            unsigned = unpack_stream(codes, self.spec.input.width, self.spec.weight_bits)
            codes = pack_stream(unsigned + IntegerGrid(self.spec.weight_bits).low - IntegerGrid(bits).low, bits)
        made = codes, scale, bits
        # Without a second level the scale is the buffer itself; keeping it would outlive a change of the buffer.
        if statistic_codes is not None or bits != self.spec.weight_bits:
            self._derived = source, version, made
        return made

    def extra_repr(self) -> str:
        spec = self.spec
        levels = f", second level of {spec.tile} rows" if spec.tile else ""
        return f"{super().extra_repr()}{levels}, {spec.outliers} outliers"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_derived": None}
