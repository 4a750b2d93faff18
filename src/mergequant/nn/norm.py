"""QuantNorm: a norm whose output is integer codes, or floats with a bias that the architecture does not know."""

import torch
from torch import Tensor

from mergequant import ops
from mergequant.nn.base import QuantModule
from mergequant.nn.spec import FLOAT_BITS, NormSpec
from mergequant.ops.norm_quant import layernorm

__all__ = ["QuantNorm"]


class QuantNorm(QuantModule):
    """RMSNorm or LayerNorm that multiplies by gain / step, rounds and clamps (MergeQuant: quantization step migration).

    Buffers:
        multiplier: float32 (width,), gain / step.
        index: int32 (width,), channel that each code reads; only if `spec.gathers`.
        shift: float32 (width,), bias / step + stagger offset; only if `spec.shifts`.

    With `spec.bits` = 16 nothing is rounded and the step is 1: multiplier and shift are gain and bias.
    """

    multiplier: Tensor
    index: Tensor | None
    shift: Tensor | None

    def __init__(self, spec: NormSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("multiplier", torch.ones(spec.width, dtype=torch.float32))
        self.register_buffer("index", torch.zeros(spec.width, dtype=torch.int32) if spec.gathers else None)
        self.register_buffer("shift", torch.zeros(spec.width, dtype=torch.float32) if spec.shifts else None)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., channels) to int8 codes (..., width), or to floats (..., channels)."""
        if self.gives_floats:
            return self._floats(hidden)
        op = ops.rmsnorm_quant if self.spec.norm == "rms" else ops.layernorm_quant
        return op(hidden, self.multiplier, self.index, self.shift, self.spec.eps, self.spec.bits)

    @property
    def gives_floats(self) -> bool:
        """Whether the output is not rounded to codes."""
        return self.spec.bits == FLOAT_BITS

    def _floats(self, hidden: Tensor) -> Tensor:
        if self.spec.norm == "rms":
            return ops.add_rmsnorm(None, hidden.contiguous(), self.multiplier, self.spec.eps, self.shift)
        normed = layernorm(hidden, self.spec.eps) * self.multiplier
        return (normed if self.shift is None else normed + self.shift).to(hidden.dtype)

    def extra_repr(self) -> str:
        spec = self.spec
        kind = "float" if self.gives_floats else f"int{spec.bits}"
        return f"{spec.norm}, {spec.channels} -> {spec.width} {kind}, eps={spec.eps}"
