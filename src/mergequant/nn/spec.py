"""Descriptions of quantized modules: frozen data that a checkpoint stores per layer and a module is built from.

`to_dict` leaves out defaults; `from_dict` refuses unknown keys, wrong types and values that make no module.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

from mergequant.errors import CheckpointError
from mergequant.grids.codebook import LARGEST_INDEX_BITS
from mergequant.grids.integer import SUPPORTED_BITS
from mergequant.grids.outliers import LARGEST_OUTLIER_WIDTH
from mergequant.grids.packing import container_bits
from mergequant.grids.power import LARGEST_EXPONENT, SMALLEST_EXPONENT, SQUARES
from mergequant.grids.second_level import MOST_STATISTIC_BITS
from mergequant.grids.two_level import TWO_LEVEL_BITS

__all__ = [
    "FLOAT_BITS",
    "CodebookSpec",
    "InputSpec",
    "KVSpec",
    "LinearSpec",
    "NormSpec",
    "PartSpec",
    "PrefixSpec",
    "SparseSpec",
    "Spec",
    "spec_from_dict",
]

InputKind = Literal["codes", "static", "dynamic", "float"]
NormKind = Literal["rms", "layer"]
ZeroKind = Literal["none", "integer", "float"]

FLOAT_BITS = 16  # of a norm that gives floats
LARGEST_WHOLE = 1 << 53  # whole numbers up to here are exact in a float


@dataclass(frozen=True)
class Spec:
    """Base of all descriptions: JSON in and out, strictly."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready dict without the fields that hold their default."""
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if isinstance(value, tuple) and value and isinstance(value[0], Spec):
                value = [item.to_dict() for item in value]
            out[field.name] = value.to_dict() if isinstance(value, Spec) else value
        return out

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Self:
        """Build from JSON.

        Raises:
            CheckpointError: naming `where`, the key and what is wrong with it.
        """
        if not isinstance(data, dict):
            raise CheckpointError(f"{where}: expected an object, found {type(data).__name__}")
        hints = get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in data:
            if key not in fields:
                raise CheckpointError(f"{where}: unknown key {key!r}; known are {', '.join(fields)}")
        values = {}
        for name, field in fields.items():
            if name not in data:
                if field.default is dataclasses.MISSING:
                    raise CheckpointError(f"{where}: key {name!r} is missing")
                continue
            values[name] = _check(hints[name], data[name], f"{where}.{name}")
        spec = cls(**values)
        spec.validate(where)
        return spec

    def validate(self, where: str) -> None:
        """Raise CheckpointError where the fields contradict each other."""


@dataclass(frozen=True)
class InputSpec(Spec):
    """How the input of a linear layer becomes codes.

    Attributes:
        kind: "codes" (a norm already emits them), "static", "dynamic" (a scale per token) or "float" (weight-only).
        in_width: channels of the tensor that arrives.
        width: columns of the weight; differs from `in_width` when channels are split, padded or dropped.
        bits: width of the clamp (unused for "float").
        rotation: name of the online rotation of the `in_width` channels, "" for none.
        per_channel: a static multiplier per code, else one for the tensor. An input that is not static has a multiplier
            per arriving channel, or none: what its weight columns were divided by, and nothing in front could take up.
        gathers: an index says which channel each code reads.
        merges: channels that dynamic inputs add to others before they are quantized: number of codes that take one more
            in each round (`ops.reassemble`); the index is as much longer.
        shifts: an offset is added behind the multiplier, before anything is rounded.
        clip_ratio: fraction of a token's largest magnitude that a dynamic grid covers.
        left, right: orders of the stored factors of a Kronecker product that a dynamic input is multiplied by first;
            0 = none. A left factor alone stands for left (x) identity.
    """

    kind: InputKind
    in_width: int
    width: int
    bits: int = 8
    rotation: str = ""
    per_channel: bool = False
    gathers: bool = False
    shifts: bool = False
    clip_ratio: float = 1.0
    left: int = 0
    right: int = 0
    merges: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        out = super().to_dict()
        return {**out, "merges": list(self.merges)} if self.merges else out

    def validate(self, where: str) -> None:
        if self.in_width < 1 or self.width < 1 or self.bits not in SUPPORTED_BITS:
            raise CheckpointError(f"{where}: widths must be positive and bits one of {SUPPORTED_BITS}")
        if not 0 < self.clip_ratio <= 1:
            raise CheckpointError(f"{where}: clip_ratio {self.clip_ratio} is outside (0, 1]")
        if self.width != self.in_width and not (self.gathers or self.kind == "codes"):
            raise CheckpointError(f"{where}: width {self.width} differs from {self.in_width} without a gather index")
        if self.kind == "codes" and (self.per_channel or self.shifts):
            raise CheckpointError(f"{where}: per_channel and shifts belong to inputs that arrive as floats, not codes")
        if self.kind != "static" and self.shifts and not self.per_channel:
            raise CheckpointError(f"{where}: shifts of {self.kind} inputs need per_channel")
        if self.gathers and self.kind not in ("static", "dynamic"):
            raise CheckpointError(f"{where}: gathers belongs to static or dynamic inputs, not {self.kind}")
        if self.gathers and self.kind == "dynamic" and (self.rotation or self.left):
            raise CheckpointError(f"{where}: a dynamic input either gathers or is transformed")
        if self.merges and not (self.gathers and self.kind == "dynamic"):
            raise CheckpointError(f"{where}: merges belongs to dynamic inputs that gather")
        if any(not 0 < count <= most for count, most in zip(self.merges, (self.width, *self.merges))):
            raise CheckpointError(f"{where}: merges {list(self.merges)} must be positive and not increase")
        if self.kind == "codes" and self.rotation:
            raise CheckpointError(f"{where}: codes cannot be rotated; only float inputs can")
        if self.left or self.right:
            self._validate_factors(where)

    def _validate_factors(self, where: str) -> None:
        if self.kind != "dynamic" or self.rotation:
            raise CheckpointError(f"{where}: left and right belong to dynamic inputs without a rotation")
        whole = self.left * self.right if self.right else self.left
        fits = self.in_width == whole if self.right else whole > 0 and self.in_width % whole == 0
        if self.left < 1 or self.right < 0 or not fits:
            raise CheckpointError(f"{where}: factors of order {self.left} and {self.right} make no {self.in_width}")


@dataclass(frozen=True)
class LinearSpec(Spec):
    """A quantized linear layer: `outputs` rows of `input.width` codes of `weight_bits` bits.

    `group_size` columns share a weight scale; 0 = one scale per row. Only float inputs may use groups, unless weights
    have two `levels`: then rows have a scale, and groups (0 = one for the row) an integer step and an integer zero.
    `zeros`: every weight scale has a zero point, an integer (int8) or any number (float16): for float inputs only, as
    an integer GEMM would need the sums of its inputs, too.
    `across`: `group_size` outputs of one column share a scale, instead of columns of one row (`grids/across.py`).
    `exponent`: a code c stands for sign(c) |c|^(1/exponent) (`grids/power.py`); of 1/2 these are integers, which an
    integer GEMM multiplies; others are for float inputs.
    `dense`: a code takes `weight_bits` bits in its row (`grids/bitstream.py`), not 4 or 8.
    """

    outputs: int
    input: InputSpec
    weight_bits: int = 4
    group_size: int = 0
    bias: bool = False
    levels: int = 1
    zeros: ZeroKind = "none"
    across: bool = False
    exponent: float = 1.0
    dense: bool = False

    @property
    def gemm_bits(self) -> int:
        """Bits of a weight as the integer GEMM takes it: 4 or 8."""
        return 8 if self.levels == 2 or self.exponent != 1 else container_bits(self.weight_bits)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Shape of the weight's scales, and of its zero points."""
        if self.across:
            return self.outputs // self.group_size, self.input.width
        return (self.outputs, self.groups) if self.group_size and self.levels == 1 else (self.outputs,)

    @property
    def groups(self) -> int:
        """Groups in a row."""
        return self.input.width // (self.group_size or self.input.width)

    def validate(self, where: str) -> None:
        if self.outputs < 1 or self.weight_bits not in SUPPORTED_BITS:
            raise CheckpointError(f"{where}: outputs must be positive and weight_bits one of {SUPPORTED_BITS}")
        grouped = self.outputs if self.across else self.input.width
        if self.across and (self.group_size < 1 or self.outputs % self.group_size or self.levels == 2):
            raise CheckpointError(
                f"{where}: across needs a group_size that divides {self.outputs} outputs, and one level"
            )
        if self.group_size and (self.group_size < 0 or grouped % self.group_size):
            raise CheckpointError(f"{where}: group_size {self.group_size} does not divide {self.input.width} columns")
        if self.levels not in (1, 2) or (self.levels == 2 and self.weight_bits != TWO_LEVEL_BITS):
            raise CheckpointError(f"{where}: levels must be 1, or 2 with weights of {TWO_LEVEL_BITS} bits")
        if self.group_size and self.input.kind != "float" and self.levels == 1:
            raise CheckpointError(f"{where}: groups along the reduction axis need float inputs, not {self.input.kind}")
        if self.zeros != "none" and (self.input.kind != "float" or self.levels == 2):
            raise CheckpointError(f"{where}: zeros need float inputs, not {self.input.kind}, and one level")
        if self.exponent != 1:
            self._validate_power(where)
        if self.dense and self.levels == 2:
            raise CheckpointError(f"{where}: dense belongs to weights of one level")
        if self.weight_bits <= 4 and self.input.width % 2 and not self.dense:
            raise CheckpointError(f"{where}: {self.input.width} columns of {self.weight_bits} bits do not fill bytes")

    def _validate_power(self, where: str) -> None:
        if not SMALLEST_EXPONENT <= self.exponent <= LARGEST_EXPONENT:
            raise CheckpointError(f"{where}: exponent {self.exponent} is not {SMALLEST_EXPONENT}..{LARGEST_EXPONENT}")
        if self.zeros != "none" or self.levels == 2:
            raise CheckpointError(f"{where}: powers know neither zero points nor two levels")
        if self.input.kind != "float" and (self.exponent != SQUARES or self.weight_bits > 4):
            raise CheckpointError(
                f"{where}: integer inputs take weights of 4 bits with exponent {SQUARES}: int8 squares"
            )


@dataclass(frozen=True)
class PartSpec(Spec):
    """Consecutive columns of a weight in codebooks (`grids/codebook.py`).

    Attributes:
        columns: how many.
        vector: outputs that one index stands for.
        bits: width of an index; a book has 2^bits entries.
        residual_bits: width of a second index, whose entry is added; 0 = none.
        groups: books, one for each of as many equal runs of columns.
    """

    columns: int
    vector: int
    bits: int
    residual_bits: int = 0
    groups: int = 1

    @property
    def entries(self) -> int:
        """Entries of a book, those of the residual behind the others."""
        return (1 << self.bits) + (1 << self.residual_bits if self.residual_bits else 0)

    def validate(self, where: str) -> None:
        if min(self.columns, self.vector, self.bits, self.groups) < 1 or self.columns % self.groups:
            raise CheckpointError(f"{where}: columns, vector, bits and groups are positive, and groups divide columns")
        if self.bits > LARGEST_INDEX_BITS or not 0 <= self.residual_bits <= LARGEST_INDEX_BITS:
            raise CheckpointError(f"{where}: indices have at most {LARGEST_INDEX_BITS} bits")


@dataclass(frozen=True)
class CodebookSpec(LinearSpec):
    """A linear layer whose weight is stored as indices into books of vectors; its input stays in floating point.

    `parts` hold all columns, one after the other; with `ordered` in an order that is stored. To them `outliers` single
    values are added. The fields of integer weights keep their defaults.
    """

    parts: tuple[PartSpec, ...] = ()
    ordered: bool = False
    outliers: int = 0

    def validate(self, where: str) -> None:
        if self.outputs < 1 or self.outliers < 0 or self.input.kind != "float":
            raise CheckpointError(f"{where}: codebooks need outputs and float inputs, not {self.input.kind}")
        for field in dataclasses.fields(LinearSpec):
            known = field.default is dataclasses.MISSING or field.name == "bias"
            if not known and getattr(self, field.name) != field.default:
                raise CheckpointError(f"{where}: {field.name} belongs to integer weights, not to codebooks")
        if (self.ordered or self.outliers) and self.input.width > LARGEST_OUTLIER_WIDTH:
            raise CheckpointError(f"{where}: numbers of {self.input.width} columns have more than 16 bits")
        columns = sum(part.columns for part in self.parts)
        if columns != self.input.width:
            raise CheckpointError(f"{where}: parts of {columns} columns make no weight of {self.input.width}")


@dataclass(frozen=True)
class SparseSpec(LinearSpec):
    """A weight-only linear layer in groups, with outliers that are added to them; codes are rows of bits.

    Attributes:
        outliers: values that are added, or whole columns of them; always written, since it tells the kind of layer.
        whole_columns: outliers are whole columns.
        tile: neighbouring rows that share second-level grids of scales and zeros; 0 = both are stored in 16 bits.
        statistic_bits: bits of the codes on these grids.
        ordered: columns are stored in another order than that of the channels.
    """

    outliers: int = dataclasses.field(kw_only=True)
    whole_columns: bool = False
    tile: int = 0
    statistic_bits: int = 3
    ordered: bool = False

    def validate(self, where: str) -> None:
        width, size = self.input.width, self.group_size
        if self.outputs < 1 or self.weight_bits not in SUPPORTED_BITS or self.input.kind != "float":
            raise CheckpointError(
                f"{where}: outliers need outputs, weight_bits of {SUPPORTED_BITS}, and float inputs, not "
                f"{self.input.kind}"
            )
        if size < 0 or (size and width % size):
            raise CheckpointError(f"{where}: group_size {size} does not divide {width} columns")
        if self.levels != 1 or self.across or self.exponent != 1 or self.dense or self.zeros == "integer":
            raise CheckpointError(
                f"{where}: outliers go with one level of even steps along rows and with zeros of 16 bits"
            )
        if self.tile < 0 or (self.tile and self.zeros != "float"):
            raise CheckpointError(f"{where}: tile {self.tile} is negative, or lacks zeros to quantize")
        if not 2 <= self.statistic_bits <= MOST_STATISTIC_BITS:
            raise CheckpointError(f"{where}: statistic_bits {self.statistic_bits} is not 2..{MOST_STATISTIC_BITS}")
        most = width if self.whole_columns else self.outputs * width
        if not 0 <= self.outliers <= most or width > LARGEST_OUTLIER_WIDTH:
            raise CheckpointError(f"{where}: {self.outliers} outliers do not fit {self.outputs} x {width} weights")


@dataclass(frozen=True)
class NormSpec(Spec):
    """A norm over `channels` that emits `width` codes of `bits` bits.

    With 16 bits it gives floats: a norm that has a bias (`shifts`) where the architecture's own has none.
    """

    norm: NormKind
    channels: int
    width: int
    bits: int
    eps: float
    gathers: bool = False
    shifts: bool = False

    def validate(self, where: str) -> None:
        known = (*SUPPORTED_BITS, FLOAT_BITS)
        if self.channels < 1 or self.width < 1 or self.bits not in known or not 0 <= self.eps < math.inf:
            raise CheckpointError(f"{where}: widths must be positive, bits one of {known}, eps finite and >= 0")
        if self.bits == FLOAT_BITS and self.gathers:
            raise CheckpointError(f"{where}: a norm that gives floats gathers no channels")
        if self.width != self.channels and not self.gathers:
            raise CheckpointError(f"{where}: width {self.width} differs from {self.channels} without a gather index")


@dataclass(frozen=True)
class PrefixSpec(Spec):
    """Tokens whose keys and values every cache starts with.

    Attributes:
        tokens: token ids of the prefix, in order.
        replaces_bos: a prompt's own first token (BOS) is the prefix's first one and is not run again.
        layers: number of blocks that hold keys and values.
        kv_heads, key_width, value_width: shape of one layer's entry.
        channels: width of the hidden states.
    """

    tokens: tuple[int, ...]
    replaces_bos: bool
    layers: int
    kv_heads: int
    key_width: int
    value_width: int
    channels: int

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "tokens": list(self.tokens)}

    def validate(self, where: str) -> None:
        if not self.tokens or min(self.layers, self.kv_heads, self.key_width, self.value_width, self.channels) < 1:
            raise CheckpointError(f"{where}: a prefix needs tokens, layers, heads and widths")


@dataclass(frozen=True)
class KVSpec(Spec):
    """Static steps of a quantized key and value cache, for 8 and for 4 bits.

    Attributes:
        layers: number of blocks that hold keys and values.
        kv_heads, key_width, value_width: shape of one token's entry in one layer.
        key_rotation: name of the rotation of the `key_width` channels that keys are rounded behind, "" for none.
    """

    layers: int
    kv_heads: int
    key_width: int
    value_width: int
    key_rotation: str = ""

    def validate(self, where: str) -> None:
        if min(self.layers, self.kv_heads, self.key_width, self.value_width) < 1:
            raise CheckpointError(f"{where}: a quantized cache needs layers, heads and widths")


def spec_from_dict(data: Any, where: str) -> LinearSpec | NormSpec:
    """A layer's description, told apart by its keys.

    Raises:
        CheckpointError: as `Spec.from_dict`.
    """
    if isinstance(data, dict) and "norm" in data:
        return NormSpec.from_dict(data, where)
    if isinstance(data, dict) and "parts" in data:
        return CodebookSpec.from_dict(data, where)
    if isinstance(data, dict) and "outliers" in data:
        return SparseSpec.from_dict(data, where)
    return LinearSpec.from_dict(data, where)


def _check(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, type) and issubclass(hint, Spec):
        return hint.from_dict(value, where)
    if hint == tuple[int, ...]:
        if not isinstance(value, (list, tuple)) or not all(type(item) is int and item >= 0 for item in value):
            raise CheckpointError(f"{where}: expected a list of whole numbers, found {value!r}")
        return tuple(value)
    if get_origin(hint) is tuple and issubclass(get_args(hint)[0], Spec):
        if not isinstance(value, (list, tuple)) or not value:
            raise CheckpointError(f"{where}: expected a list of descriptions, found {value!r}")
        return tuple(get_args(hint)[0].from_dict(item, f"{where}.{i}") for i, item in enumerate(value))
    choices = get_args(hint)
    if choices:
        if value not in choices:
            raise CheckpointError(f"{where}: {value!r} is not one of {', '.join(map(repr, choices))}")
        return value
    if hint is float and type(value) is int and abs(value) < LARGEST_WHOLE:
        value = float(value)
    if type(value) is not hint:
        raise CheckpointError(f"{where}: expected {hint.__name__}, found {value!r}")
    return value
