"""QuantNorm: a norm whose output is integer codes."""

import torch
from torch import Tensor

from mergequant import ops
from mergequant.nn.base import QuantModule
from mergequant.nn.spec import NormSpec

__all__ = ["QuantNorm"]


class QuantNorm(QuantModule):
    """RMSNorm or LayerNorm that multiplies by gain / step, rounds and clamps (MergeQuant: quantization step migration).

    Buffers:
        multiplier: float32 (width,), gain / step.
        index: int32 (width,), channel that each code reads; only if `spec.gathers`.
        shift: float32 (width,), bias / step + stagger offset; only if `spec.shifts`.
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
        """Hidden states (..., channels) to int8 codes (..., width)."""
        op = ops.rmsnorm_quant if self.spec.norm == "rms" else ops.layernorm_quant
        return op(hidden, self.multiplier, self.index, self.shift, self.spec.eps, self.spec.bits)

    def extra_repr(self) -> str:
        spec = self.spec
        return f"{spec.norm}, {spec.channels} -> {spec.width} int{spec.bits}, eps={spec.eps}"
