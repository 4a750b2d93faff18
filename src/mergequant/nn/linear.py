"""QuantLinear and InputQuantizer: integer codes in, one integer GEMM, one multiply per output row."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from mergequant import ops
from mergequant.errors import CheckpointError, KernelError
from mergequant.grids import IntegerGrid, PowerGrid, container_bits, pack_codes, packed_width, unpack_codes
from mergequant.grids.across import decode_across
from mergequant.grids.bitstream import pack_stream, stream_width, unpack_stream
from mergequant.grids.power import SQUARES
from mergequant.grids.quantizer import decode
from mergequant.grids.two_level import fine_codes, middle_codes
from mergequant.nn.base import QuantModule
from mergequant.nn.spec import InputSpec, LinearSpec
from mergequant.nn.tiled_rows import TiledRows
from mergequant.ops.tiled_linear import LARGEST_WIDTH

__all__ = ["InputQuantizer", "QuantLinear"]

Made = TypeVar("Made")

CODES = "weight_codes"
TILED_DTYPES = (torch.bfloat16, torch.float16)  # outputs that the kernels on tiles write
SHARED = "the weights of this layer lie in tiles that other layers share; load the model anew, without `serve`"


class InputQuantizer(QuantModule):
    """Turns the float input of a linear layer into codes, with static or dynamic scales.

    Buffers:
        multiplier: float32 (width,) or (1,), 1 / step, for static inputs; else (in_width,), only if
            `spec.per_channel`, and applied to the input before anything else.
        index: int32 (width + sum(merges),), channel that each code reads, then those that are added to codes' inputs;
            only if `spec.gathers`.
        shift: float32, as long as the multiplier per channel, added behind it; only if `spec.shifts`.

    Buffers (dynamic only):
        left: float32 (left, left), right: float32 (right, right): factors of a Kronecker product that the input is
            multiplied by before its scale is found; only if `spec.left`, `spec.right`.
    """

    multiplier: Tensor | None
    index: Tensor | None
    shift: Tensor | None
    left: Tensor | None
    right: Tensor | None

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        self.spec = spec
        static = spec.kind == "static"
        channels = spec.width if static else spec.in_width
        length = channels if spec.per_channel else 1
        held = static or spec.per_channel
        self.register_buffer("multiplier", torch.ones(length, dtype=torch.float32) if held else None)
        read = spec.width + sum(spec.merges)
        self.register_buffer("index", torch.zeros(read, dtype=torch.int32) if spec.gathers else None)
        self.register_buffer("shift", torch.zeros(channels, dtype=torch.float32) if spec.shifts else None)
        for name, order in (("left", spec.left), ("right", spec.right)):
            self.register_buffer(name, torch.eye(order, dtype=torch.float32) if order else None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Float (..., in_width) to int8 codes (..., width) and, for dynamic inputs, float32 token scales (..., 1)."""
        rotated, bits = bool(self.spec.rotation), self.spec.bits
        if self.spec.kind != "static":
            x = self.scaled(x)
        if self.left is not None:
            flat, scale = ops.kronecker_dynamic_quant(x, self.left, self.right, self.spec.clip_ratio, bits)
            return flat, scale
        if self.multiplier is None or self.spec.kind != "static":
            if self.index is not None:
                x = ops.reassemble(x, self.index, self.spec.merges)
            dynamic = ops.hadamard_dynamic_quant if rotated else ops.dynamic_quant
            codes, scale = dynamic(x, self.spec.clip_ratio, bits)
            return codes, scale
        static = ops.hadamard_quant if rotated else ops.static_quant
        return static(x, self.multiplier, self.index, self.shift, bits), None

    def scaled(self, x: Tensor) -> Tensor:
        """The input (..., in_width) of a layer without static steps, scaled and shifted per channel if the spec says
        so; then it is float32."""
        if self.multiplier is None:
            return x
        x = x.float() * self.multiplier
        return x if self.shift is None else x + self.shift

    def extra_repr(self) -> str:
        spec = self.spec
        how = f"{spec.kind} int{spec.bits}" + (f", {spec.rotation}" if spec.rotation else "")
        how += f", factors {spec.left} x {spec.right or spec.in_width // spec.left}" if spec.left else ""
        return f"{how}, {spec.in_width} -> {spec.width}"


class QuantLinear(QuantModule):
    """A linear layer on integer codes.

    Buffers:
        weight_codes: uint8 (outputs, width / 2) for up to 4 bits, else int8 (outputs, width); `spec.dense` packs them
            without a gap, uint8 (outputs, stream_width). After `adopt` it is no
            buffer but a copy made on demand: to be read, writing into it changes nothing.
        weight_scale: float32 (outputs,), or (outputs, groups) with groups, or (outputs / group_size, width) with groups
            across the rows. A static input step is already inside. With
            two levels it is (outputs,).
        group_scale, group_zero: uint8 and int8 (outputs, groups), only with two levels (`grids/two_level.py`).
        weight_zero: int8 or float16, shaped like weight_scale, only if `spec.zeros`: a weight is (code - zero) * scale.
        bias: float32 (outputs,), optional.

    A CPU multiplies prepared weights (`ops.prepare_weight`), a GPU tiled ones (`ops.tile_weight`) if the output has 16
    bits. Both are made at first use and kept beside the codes. `adopt` gives the codes up for somebody else's tiles.
    """

    weight_scale: Tensor
    group_scale: Tensor | None
    group_zero: Tensor | None
    weight_zero: Tensor | None
    bias: Tensor | None

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__()
        self.spec = spec
        self._adopted: TiledRows | None = None
        self._derived: tuple[Tensor, int, Any] | None = None
        check_rotation(spec.input.rotation, spec.input.in_width)
        narrow = spec.dense or container_bits(spec.weight_bits) == 4
        width = (stream_width if spec.dense else packed_width)(spec.input.width, spec.weight_bits)
        self.register_buffer(CODES, torch.zeros(spec.outputs, width, dtype=torch.uint8 if narrow else torch.int8))
        self.register_buffer("weight_scale", torch.ones(spec.scale_shape, dtype=torch.float32))
        grouped, levels = (spec.outputs, spec.groups), spec.levels
        self.register_buffer("group_scale", torch.ones(grouped, dtype=torch.uint8) if levels == 2 else None)
        self.register_buffer("group_zero", torch.zeros(grouped, dtype=torch.int8) if levels == 2 else None)
        zero = torch.zeros(spec.scale_shape, dtype=torch.int8 if spec.zeros == "integer" else torch.float16)
        self.register_buffer("weight_zero", None if spec.zeros == "none" else zero)
        self.register_buffer("bias", torch.zeros(spec.outputs, dtype=torch.float32) if spec.bias else None)
        self.input_quantizer: InputQuantizer | None = None
        if spec.input.kind in ("static", "dynamic") or spec.input.per_channel:
            self.input_quantizer = InputQuantizer(spec.input)

    @property
    def in_features(self) -> int:
        """Channels of the tensor that arrives (what transformers' code may ask a linear layer for)."""
        return self.spec.input.in_width

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.spec.outputs

    @property
    def weight_codes(self) -> Tensor:
        """The codes as a checkpoint stores them: the buffer, or a copy out of the adopted tiles."""
        buffer = self._buffers.get(CODES)
        if buffer is not None:
            return buffer
        if self._adopted is None:
            raise AttributeError(CODES)  # what nn.Module expects of a buffer that is about to be registered
        codes = self._adopted.codes()
        if self.group_scale is not None and self.group_zero is not None:
            codes = fine_codes(codes, self.group_scale, self.group_zero)
        if self.spec.exponent != 1:
            codes = torch.where(codes < 0, -1, 1).to(torch.int8) * codes.abs().float().sqrt().to(torch.int8)  # exact
        return self.pack(codes)

    @weight_codes.setter
    def weight_codes(self, value: Tensor) -> None:  # buffers are set by nn.Module and do not come here
        raise KernelError(f"weight_codes cannot be set: {SHARED}")

    def pack(self, codes: Tensor) -> Tensor:
        """Codes (outputs, width) as this layer stores them."""
        bits = self.spec.weight_bits
        return (
            pack_stream(codes.to(torch.int32) - IntegerGrid(bits).low, bits)
            if self.spec.dense
            else pack_codes(codes, bits)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Codes (from a QuantNorm) or float hidden states (..., in_width) to (..., outputs) in the model's dtype."""
        if self.spec.input.kind == "float":
            return self._weight_only(x)
        codes, token_scale = (x, None) if self.input_quantizer is None else self.input_quantizer(x)
        out_dtype = self.out_dtype if self.input_quantizer is None else x.dtype
        eager = not torch.compiler.is_compiling() and type(codes) is Tensor  # no tracer at work
        if codes.is_cpu and eager:
            prepared = self._made(ops.prepare_weight)
            return ops.prepared_linear(codes, prepared, self.weight_scale, token_scale, self.bias, out_dtype)
        kernels = codes.is_cuda and eager and out_dtype in TILED_DTYPES and codes.shape[-1] <= LARGEST_WIDTH
        if kernels or self._shared is not None:
            return self._tiled(codes, token_scale, out_dtype)
        stored = not self.spec.dense and self.spec.exponent == 1
        packed = self.weight_codes if stored else self.integer_weight()
        if self.group_scale is not None and self.group_zero is not None:
            groups = self.group_scale, self.group_zero
            return ops.two_level_linear(codes, packed, *groups, self.weight_scale, token_scale, self.bias, out_dtype)
        op = ops.int8_linear if packed.dtype == torch.int8 else ops.int4_linear
        return op(codes, packed, self.weight_scale, token_scale, self.bias, out_dtype)

    def adopt(self, tiles: Tensor, rows: Tensor | slice) -> None:
        """Read the weights out of tiles that somebody else owns, from now on, and give the codes up.

        The tiles must not change any more. `state_dict` goes on to hold the codes; moving the layer to another device
        makes it independent again.

        Args:
            tiles: uint8, of `ops.tile_weight` with `spec.gemm_bits`, on the layer's device.
            rows: places of this layer's rows among those of the tiles, integers (outputs,) or a slice.

        Raises:
            KernelError: a layer without integer inputs, or tiles that do not hold its codes there.
        """
        spec = self.spec
        if spec.input.kind == "float":
            raise KernelError("adopt: a weight-only layer multiplies floats; tiles are for integer inputs")
        if tiles.device != self.weight_scale.device:
            raise KernelError(f"adopt: tiles are on {tiles.device}, the layer on {self.weight_scale.device}")
        shared = TiledRows.of(tiles, rows, spec.outputs, spec.input.width, spec.gemm_bits)
        if not torch.equal(shared.codes(), self.integer_weight()):
            raise KernelError("adopt: the tiles hold other codes at these rows; tile the codes of this very layer")
        self._buffers.pop(CODES, None)
        self._adopted, self._derived = shared, None

    def decoded_weight(self) -> Tensor:
        """Weight (outputs, width) in float32, as the integer GEMM sees it: codes, less zero points, times scales."""
        spec, rows = self.spec, self.spec.outputs
        if spec.exponent not in (1, SQUARES):
            values = PowerGrid(spec.weight_bits, spec.exponent).value(self._codes().float())
        else:
            values = self.integer_weight().float()
        if spec.across:
            return decode_across(values, self.weight_scale, self.weight_zero)
        zero = None if self.weight_zero is None else self.weight_zero.reshape(rows, -1)
        return decode(values, self.weight_scale.reshape(rows, -1), zero)

    def scale_rows(self, factor: Tensor, start: int, stop: int) -> None:
        """Multiply the outputs start..stop by a factor each: exact, since only the epilogue changes.

        Raises:
            KernelError: outputs share scales.
        """
        if self.spec.across:
            raise KernelError(
                "outputs that share scales cannot be scaled one by one; scale them before they are rounded"
            )
        factor = factor.to(self.weight_scale)
        rows = self.weight_scale[start:stop]
        rows.mul_(factor if rows.dim() == 1 else factor[:, None])
        if self.bias is not None:
            self.bias[start:stop].mul_(factor)

    def _weight_only(self, x: Tensor) -> Tensor:
        x = self._prepared(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.decoded_weight().to(x.dtype), bias)

    def _prepared(self, x: Tensor) -> Tensor:
        """A float input as the weight-only product takes it: scaled per channel and rotated, where the spec says so."""
        if self.input_quantizer is not None:
            x = self.input_quantizer.scaled(x).to(x.dtype)
        return ops.hadamard_transform(x).to(x.dtype) if self.spec.input.rotation else x

    def _tiled(self, codes: Tensor, token_scale: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        if self._shared is not None:
            return self._shared.linear(codes, self.weight_scale, token_scale, self.bias, out_dtype)
        bits = self.spec.gemm_bits
        tiles = self._made(lambda weight: ops.tile_weight(weight, bits))
        return ops.tiled_linear(codes, tiles, self.weight_scale, token_scale, self.bias, bits, out_dtype)

    @property
    def _shared(self) -> TiledRows | None:
        """Where the weights are, if they are no buffer; a buffer that somebody has put back counts more."""
        return self._adopted if self._buffers.get(CODES) is None else None

    def integer_weight(self) -> Tensor:
        """The weight as the integer GEMM multiplies it, int8 (outputs, width): codes, squares, or a middle level.

        Raises:
            KernelError: two levels whose middle no int8 holds.
        """
        shared = self._shared
        if shared is not None:
            return shared.codes()
        codes = self._codes()
        if self.spec.exponent == SQUARES:
            return codes * codes.abs()
        if self.group_scale is None or self.group_zero is None:
            return codes
        return middle_codes(codes, self.group_scale, self.group_zero)

    def _codes(self) -> Tensor:
        spec = self.spec
        if not spec.dense:
            return unpack_codes(self.weight_codes, spec.weight_bits)
        codes = unpack_stream(self.weight_codes, spec.input.width, spec.weight_bits)
        return (codes + IntegerGrid(spec.weight_bits).low).to(torch.int8)

    def _made(self, make: Callable[[Tensor], Made]) -> Made:
        """What `make` makes of the weight, int8 (outputs, width): kept, and made anew when the weight has changed.

        There is one maker for a device, and a tensor does not move: it tells what was made, too.
        """
        shared = self._shared
        source = self.weight_codes if shared is None else shared.tiles
        parts = [part for part in (source, self.group_scale, self.group_zero) if part is not None]
        version = sum(0 if part.is_inference() else part._version for part in parts)  # inference tensors count none
        known = self._derived
        # A version alone is not enough: `load_state_dict(assign=True)` brings a buffer that counts from 0 again.
        if known is None or known[0] is not source or known[1] != version:
            known = self._derived = (source, version, make(self.integer_weight()))
        return cast(Made, known[2])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._derived = None
        shared = self._shared
        if shared is not None and fn(shared.tiles[:0]).device != shared.tiles.device:
            self._buffers[CODES], self._adopted = self.weight_codes, None
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._shared is not None:
            destination[prefix + CODES] = self.weight_codes

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if self._shared is None:
            super()._load_from_state_dict(state_dict, prefix, *rest)
        elif prefix + CODES in state_dict:
            errors: list[str] = rest[-1]
            errors.append(f"{prefix}{CODES} cannot be loaded: {SHARED}")

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what is made of the weight, which oneDNN's opaque tensors would refuse."""
        return {**self.__dict__, "_derived": None}

    def extra_repr(self) -> str:
        spec = self.spec
        groups = f", groups of {spec.group_size}" if spec.group_size else ""
        groups += ", two levels" if spec.levels == 2 else ""
        groups += " across" if spec.across else ""
        groups += "" if spec.exponent == 1 else f", exponent {spec.exponent:.3g}"
        groups += "" if spec.zeros == "none" else f", {spec.zeros} zeros"
        return f"{spec.input.width} -> {spec.outputs}, int{spec.weight_bits}{groups}, input {spec.input.kind}"


def check_rotation(name: str, width: int) -> None:
    """Refuse the name of a rotation that this release does not give to the width; "" is none."""
    if name and name != ops.rotation(width).name:
        raise CheckpointError(
            f"the checkpoint rotates {width} channels by {name!r}, this release by {ops.rotation(width).name!r}; load "
            "it with the release that wrote it"
        )
