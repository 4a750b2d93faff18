"""QuantLinear and InputQuantizer: integer codes in, one integer GEMM, one multiply per output row."""

from typing import Any

import torch
from torch import Tensor, nn

from mergequant import ops
from mergequant.errors import CheckpointError
from mergequant.grids import container_bits, packed_width, unpack_codes
from mergequant.grids.quantizer import decode
from mergequant.nn.base import QuantModule
from mergequant.nn.spec import InputSpec, LinearSpec

__all__ = ["InputQuantizer", "QuantLinear"]


class InputQuantizer(QuantModule):
    """Turns the float input of a linear layer into codes, with static or dynamic scales.

    Buffers (static only):
        multiplier: float32 (width,) or (1,), 1 / step.
        index: int32 (width,), channel that each code reads; only if `spec.gathers`.
        shift: float32 (width,); only if `spec.shifts`.
    """

    multiplier: Tensor | None
    index: Tensor | None
    shift: Tensor | None

    def __init__(self, spec: InputSpec) -> None:
        super().__init__()
        self.spec = spec
        static = spec.kind == "static"
        length = spec.width if spec.per_channel else 1
        self.register_buffer("multiplier", torch.ones(length, dtype=torch.float32) if static else None)
        self.register_buffer("index", torch.zeros(spec.width, dtype=torch.int32) if spec.gathers else None)
        self.register_buffer("shift", torch.zeros(spec.width, dtype=torch.float32) if spec.shifts else None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Float (..., in_width) to int8 codes (..., width) and, for dynamic inputs, float32 token scales (..., 1)."""
        if self.spec.rotation:
            x = ops.hadamard_transform(x)
        if self.multiplier is None:
            codes, scale = ops.dynamic_quant(x, self.spec.clip_ratio, self.spec.bits)
            return codes, scale
        return ops.static_quant(x, self.multiplier, self.index, self.shift, self.spec.bits), None

    def extra_repr(self) -> str:
        spec = self.spec
        how = f"{spec.kind} int{spec.bits}" + (f", {spec.rotation}" if spec.rotation else "")
        return f"{how}, {spec.in_width} -> {spec.width}"


class QuantLinear(QuantModule):
    """A linear layer on integer codes.

    Buffers:
        weight_codes: uint8 (outputs, width / 2) for up to 4 bits, else int8 (outputs, width).
        weight_scale: float32 (outputs,), or (outputs, groups) with groups. A static input step is already inside.
        bias: float32 (outputs,), optional.
    """

    weight_codes: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__()
        self.spec = spec
        _check_rotation(spec.input)
        width = packed_width(spec.input.width, spec.weight_bits)
        dtype = torch.uint8 if container_bits(spec.weight_bits) == 4 else torch.int8
        groups = (spec.input.width // spec.group_size,) if spec.group_size else ()
        self.register_buffer("weight_codes", torch.zeros(spec.outputs, width, dtype=dtype))
        self.register_buffer("weight_scale", torch.ones((spec.outputs, *groups), dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(spec.outputs, dtype=torch.float32) if spec.bias else None)
        self.input_quantizer: InputQuantizer | None = None
        if spec.input.kind in ("static", "dynamic"):
            self.input_quantizer = InputQuantizer(spec.input)
        self._widened: tuple[Tensor, int, Tensor] | None = None

    @property
    def in_features(self) -> int:
        """Channels of the tensor that arrives (what transformers' code may ask a linear layer for)."""
        return self.spec.input.in_width

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.spec.outputs

    def forward(self, x: Tensor) -> Tensor:
        """Codes (from a QuantNorm) or float hidden states (..., in_width) to (..., outputs) in the model's dtype."""
        if self.spec.input.kind == "float":
            return self._weight_only(x)
        codes, token_scale = (x, None) if self.input_quantizer is None else self.input_quantizer(x)
        out_dtype = self.out_dtype if self.input_quantizer is None else x.dtype
        if self.weight_codes.dtype == torch.int8 or codes.device.type == "cpu":
            weight = self._int8_weight()
            return ops.int8_linear(codes, weight, self.weight_scale, token_scale, self.bias, out_dtype)
        return ops.int4_linear(codes, self.weight_codes, self.weight_scale, token_scale, self.bias, out_dtype)

    def decoded_weight(self) -> Tensor:
        """Weight (outputs, width) in float32, as the integer GEMM sees it: codes times scales."""
        codes = unpack_codes(self.weight_codes, self.spec.weight_bits).float()
        return decode(codes, self.weight_scale.reshape(self.spec.outputs, -1))

    def scale_rows(self, factor: Tensor, start: int, stop: int) -> None:
        """Multiply the outputs start..stop by a factor each: exact, since only the epilogue changes."""
        factor = factor.to(self.weight_scale)
        rows = self.weight_scale[start:stop]
        rows.mul_(factor if rows.dim() == 1 else factor[:, None])
        if self.bias is not None:
            self.bias[start:stop].mul_(factor)

    def _weight_only(self, x: Tensor) -> Tensor:
        if self.spec.input.rotation:
            x = ops.hadamard_transform(x).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.decoded_weight().to(x.dtype), bias)

    def _int8_weight(self) -> Tensor:
        """int8 (outputs, width). Packed weights are widened once per buffer and version of it."""
        packed = self.weight_codes
        if packed.dtype == torch.int8:
            return packed
        if torch.compiler.is_compiling():
            return unpack_codes(packed, self.spec.weight_bits)
        version = 0 if packed.is_inference() else packed._version  # inference tensors count no versions
        known = self._widened
        # A version alone is not enough: `load_state_dict(assign=True)` brings a buffer that counts from 0 again.
        if known is None or known[0] is not packed or known[1] != version:
            known = self._widened = (packed, version, unpack_codes(packed, self.spec.weight_bits))
        return known[2]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._widened = None
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        spec = self.spec
        groups = f", groups of {spec.group_size}" if spec.group_size else ""
        return f"{spec.input.width} -> {spec.outputs}, int{spec.weight_bits}{groups}, input {spec.input.kind}"


def _check_rotation(spec: InputSpec) -> None:
    if spec.rotation and spec.rotation != ops.rotation(spec.in_width).name:
        raise CheckpointError(
            f"the checkpoint rotates {spec.in_width} channels by {spec.rotation!r}, this release by "
            f"{ops.rotation(spec.in_width).name!r}; load it with the release that wrote it"
        )
