"""Triton version of `silu_mul`, `silu_mul_quant` and `silu_mul_dynamic_quant`: the quantizers' kernels, with gates."""

import torch
from torch import Tensor

from mergequant.ops.triton import dynamic_quant as dynamic
from mergequant.ops.triton import static_quant as static

__all__ = ["silu_mul", "silu_mul_dynamic_quant", "silu_mul_quant"]


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu_mul` of checked arguments."""
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty((*gate_up.shape[:-1], width))
    static.quantize(gate_up, None, None, None, out, width, bits=None, gated=True)
    return out


def silu_mul_quant(
    gate_up: Tensor, multiplier: Tensor | None, index: Tensor | None, shift: Tensor | None, bits: int
) -> Tensor:
    """`silu_mul_quant` of checked arguments."""
    width = gate_up.shape[-1] // 2 if index is None else index.shape[0]
    out = torch.empty((*gate_up.shape[:-1], width), dtype=torch.int8, device=gate_up.device)
    static.quantize(gate_up, multiplier, index, shift, out, width, bits, gated=True)
    return out


def silu_mul_dynamic_quant(gate_up: Tensor, clip_ratio: float, bits: int) -> tuple[Tensor, Tensor]:
    """`silu_mul_dynamic_quant` of checked arguments."""
    return dynamic.quantize_tokens(gate_up, gate_up.shape[-1] // 2, clip_ratio, bits, gated=True)
