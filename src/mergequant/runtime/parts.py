"""Parts of a layer: norms, input quantizers and linear layers as plain data around the ops.

They hold the tensors of the loaded modules (or random ones), never copies of them, so that weights are in memory once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergequant import ops

__all__ = [
    "Branch",
    "FloatNorm",
    "FusedGate",
    "ModuleLinear",
    "Norm",
    "Projection",
    "Quantizer",
    "QuantizingNorm",
    "TiledLinear",
]


@dataclass(frozen=True, eq=False)
class QuantizingNorm:
    """RMSNorm that emits codes; the buffers of a `QuantNorm`."""

    multiplier: Tensor
    index: Tensor | None
    shift: Tensor | None
    eps: float
    bits: int

    def __call__(self, x: Tensor | None, residual: Tensor) -> Tensor:
        """Add x (..., channels) to the residual in place, and norm the sum: int8 codes (..., width)."""
        if x is None:
            return ops.rmsnorm_quant(residual, self.multiplier, self.index, self.shift, self.eps, self.bits)
        return ops.add_rmsnorm_quant(x, residual, self.multiplier, self.index, self.shift, self.eps, self.bits)


@dataclass(frozen=True, eq=False)
class FloatNorm:
    """RMSNorm that was left in floating point; with a bias where channels were shifted."""

    weight: Tensor
    eps: float
    bias: Tensor | None = None

    def __call__(self, x: Tensor | None, residual: Tensor) -> Tensor:
        """Add x (..., channels) to the residual in place, and norm the sum in the residual's dtype."""
        return ops.add_rmsnorm(x, residual, self.weight, self.eps, self.bias)


Norm = QuantizingNorm | FloatNorm


@dataclass(frozen=True, eq=False)
class Quantizer:
    """Float input to codes; the buffers of an `InputQuantizer`. Without a multiplier every token gets its own scale."""

    bits: int
    multiplier: Tensor | None = None
    index: Tensor | None = None
    shift: Tensor | None = None
    rotates: bool = False
    clip_ratio: float = 1.0
    left: Tensor | None = None
    right: Tensor | None = None
    merges: tuple[int, ...] = ()

    @property
    def scales_only(self) -> bool:
        """Codes are round(x * multiplier): what the producer of x can do on its way out."""
        return self.multiplier is not None and self.index is None and self.shift is None and not self.rotates

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(..., in_width) float to int8 codes (..., width) and, if dynamic, float32 token scales (..., 1)."""
        if self.left is not None:
            flat, scale = ops.kronecker_dynamic_quant(x, self.left, self.right, self.clip_ratio, self.bits)
            return flat, scale
        if self.multiplier is None:
            if self.index is not None:
                x = ops.reassemble(x, self.index, self.merges)
            dynamic = ops.hadamard_dynamic_quant if self.rotates else ops.dynamic_quant
            codes, scale = dynamic(x, self.clip_ratio, self.bits)
            return codes, scale
        static = ops.hadamard_quant if self.rotates else ops.static_quant
        return static(x, self.multiplier, self.index, self.shift, self.bits), None

    def of_product(self, gate_up: Tensor) -> tuple[Tensor, Tensor | None]:
        """Codes of silu(gate) * up from (..., 2 ffn)."""
        if self.left is not None or (self.multiplier is None and self.index is not None):
            return self(ops.silu_mul(gate_up))
        if self.multiplier is None:
            dynamic = ops.silu_mul_hadamard_dynamic_quant if self.rotates else ops.silu_mul_dynamic_quant
            codes, scale = dynamic(gate_up, self.clip_ratio, self.bits)
            return codes, scale
        static = ops.silu_mul_hadamard_quant if self.rotates else ops.silu_mul_quant
        return static(gate_up, self.multiplier, self.index, self.shift, self.bits), None


@dataclass(frozen=True, eq=False)
class TiledLinear:
    """One integer GEMM: tiles of one or several layers of the model, row under row."""

    tiles: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    weight_bits: int

    def __call__(self, codes: Tensor, token_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """int8 codes (..., width) to (..., outputs) in `dtype`."""
        return ops.tiled_linear(codes, self.tiles, self.weight_scale, token_scale, self.bias, self.weight_bits, dtype)


@dataclass(frozen=True, eq=False)
class ModuleLinear:
    """A linear layer of the model that takes floats (not quantized, or its weights alone): run as it is."""

    module: nn.Module


@dataclass(frozen=True, eq=False)
class Branch:
    """One GEMM and what makes its codes; no quantizer where codes (or plain floats) arrive."""

    quantizer: Quantizer | None
    linear: TiledLinear | ModuleLinear

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if isinstance(self.linear, ModuleLinear):
            return self.linear.module(x)
        codes, token_scale = (x, None) if self.quantizer is None else self.quantizer(x)
        return self.linear(codes, token_scale, dtype)


@dataclass(frozen=True, eq=False)
class Projection:
    """Linear layers that read one tensor, in as few GEMMs as possible; their outputs stand side by side."""

    branches: tuple[Branch, ...]

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Codes of a norm, or floats, (..., width) to (..., all outputs) in `dtype`."""
        if len(self.branches) == 1:
            return self.branches[0](x, dtype)
        return torch.cat([branch(x, dtype) for branch in self.branches], -1)

    @property
    def quantizer(self) -> Quantizer | None:
        """What the producer of the input may do in this projection's place; None if there is no single quantizer."""
        return self.branches[0].quantizer if len(self.branches) == 1 else None

    def of_codes(self, codes: Tensor, token_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        """As a call, on what `quantizer` would have made of the input."""
        linear = self.branches[0].linear
        assert isinstance(linear, TiledLinear)  # only those stand behind a quantizer
        return linear(codes, token_scale, dtype)


@dataclass(frozen=True, eq=False)
class FusedGate:
    """Gate, up, SwiGLU and the quantizer of down's input in one GEMM.

    The quantizer's multiplier is inside the up rows' scales (and biases): silu(g) * (u m) = (silu(g) u) m. This rounds
    u m once where the separate way rounds silu(g) u once more, an ulp of float32 before the codes are rounded.

    Attributes:
        quantizer: of the input, None where a norm emits codes.
        tiles, weight_scale, bias: rows in the order of `ops.interleave_rows`.
        bits: of the codes that come out.
    """

    quantizer: Quantizer | None
    tiles: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    weight_bits: int
    bits: int

    def __call__(self, x: Tensor) -> Tensor:
        """Codes or floats (..., width) to int8 codes (..., ffn)."""
        codes, token_scale = (x, None) if self.quantizer is None else self.quantizer(x)
        return ops.tiled_swiglu_quant(
            codes, self.tiles, self.weight_scale, token_scale, self.bias, self.weight_bits, self.bits
        )
