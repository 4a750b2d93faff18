"""Ops: one computation of the run time each, with a plain torch reference, registered with `torch.library`."""

from mergequant.ops.dynamic_quant import dynamic_quant
from mergequant.ops.explain import ARCHITECTURES, Choice, explain
from mergequant.ops.hadamard import Rotation, hadamard_transform, rotation
from mergequant.ops.int_linear import int4_linear, int8_linear
from mergequant.ops.int_matmul import backend, int_matmul
from mergequant.ops.norm_quant import layernorm_quant, rmsnorm_quant
from mergequant.ops.static_quant import quantize_scaled, static_quant

__all__ = [
    "ARCHITECTURES",
    "Choice",
    "Rotation",
    "backend",
    "dynamic_quant",
    "explain",
    "hadamard_transform",
    "int4_linear",
    "int8_linear",
    "int_matmul",
    "layernorm_quant",
    "quantize_scaled",
    "rmsnorm_quant",
    "rotation",
    "static_quant",
]
