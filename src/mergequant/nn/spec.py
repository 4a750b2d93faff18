"""Descriptions of quantized modules: frozen data that a checkpoint stores per layer and a module is built from.

`to_dict` leaves out defaults; `from_dict` refuses unknown keys, wrong types and values that make no module.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, Self, get_args, get_type_hints

from mergequant.errors import CheckpointError
from mergequant.grids.integer import SUPPORTED_BITS

__all__ = ["InputSpec", "KVSpec", "LinearSpec", "NormSpec", "PrefixSpec", "Spec", "spec_from_dict"]

InputKind = Literal["codes", "static", "dynamic", "float"]
NormKind = Literal["rms", "layer"]

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
        per_channel: a static multiplier per code; else one for the tensor.
        gathers: an index says which channel each code reads.
        shifts: an offset is added before rounding.
        clip_ratio: fraction of a token's largest magnitude that a dynamic grid covers.
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

    def validate(self, where: str) -> None:
        if self.in_width < 1 or self.width < 1 or self.bits not in SUPPORTED_BITS:
            raise CheckpointError(f"{where}: widths must be positive and bits one of {SUPPORTED_BITS}")
        if not 0 < self.clip_ratio <= 1:
            raise CheckpointError(f"{where}: clip_ratio {self.clip_ratio} is outside (0, 1]")
        if self.width != self.in_width and not (self.gathers or self.kind == "codes"):
            raise CheckpointError(f"{where}: width {self.width} differs from {self.in_width} without a gather index")
        if self.kind != "static" and (self.per_channel or self.gathers or self.shifts):
            raise CheckpointError(f"{where}: per_channel, gathers and shifts belong to static inputs, not {self.kind}")
        if self.kind == "codes" and self.rotation:
            raise CheckpointError(f"{where}: codes cannot be rotated; only float inputs can")


@dataclass(frozen=True)
class LinearSpec(Spec):
    """A quantized linear layer: `outputs` rows of `input.width` codes of `weight_bits` bits.

    `group_size` columns share a weight scale; 0 = one scale per row. Only float inputs may use groups.
    """

    outputs: int
    input: InputSpec
    weight_bits: int = 4
    group_size: int = 0
    bias: bool = False

    def validate(self, where: str) -> None:
        if self.outputs < 1 or self.weight_bits not in SUPPORTED_BITS:
            raise CheckpointError(f"{where}: outputs must be positive and weight_bits one of {SUPPORTED_BITS}")
        if self.group_size and (self.group_size < 0 or self.input.width % self.group_size):
            raise CheckpointError(f"{where}: group_size {self.group_size} does not divide {self.input.width} columns")
        if self.group_size and self.input.kind != "float":
            raise CheckpointError(f"{where}: groups along the reduction axis need float inputs, not {self.input.kind}")
        if self.weight_bits <= 4 and self.input.width % 2:
            raise CheckpointError(f"{where}: {self.input.width} columns of {self.weight_bits} bits do not fill bytes")


@dataclass(frozen=True)
class NormSpec(Spec):
    """A norm over `channels` that emits `width` codes of `bits` bits."""

    norm: NormKind
    channels: int
    width: int
    bits: int
    eps: float
    gathers: bool = False
    shifts: bool = False

    def validate(self, where: str) -> None:
        if self.channels < 1 or self.width < 1 or self.bits not in SUPPORTED_BITS or not 0 <= self.eps < math.inf:
            raise CheckpointError(
                f"{where}: widths must be positive, bits one of {SUPPORTED_BITS}, eps finite and >= 0"
            )
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
    """

    layers: int
    kv_heads: int
    key_width: int
    value_width: int

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
    return LinearSpec.from_dict(data, where)


def _check(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, type) and issubclass(hint, Spec):
        return hint.from_dict(value, where)
    if hint == tuple[int, ...]:
        if not isinstance(value, (list, tuple)) or not all(type(item) is int and item >= 0 for item in value):
            raise CheckpointError(f"{where}: expected a list of whole numbers, found {value!r}")
        return tuple(value)
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
