"""Ops: one computation of the run time each, with a plain torch reference, registered with `torch.library`."""

from mergequant.ops.add_norm import add_rmsnorm, add_rmsnorm_quant
from mergequant.ops.codebook_linear import codebook_linear, codebook_weight
from mergequant.ops.cpu_linear import PreparedWeight, cpu_backend, prepare_weight, prepared_linear
from mergequant.ops.dynamic_quant import dynamic_quant
from mergequant.ops.explain import ARCHITECTURES, Choice, explain
from mergequant.ops.hadamard import Rotation, hadamard_transform, rotation
from mergequant.ops.hadamard_quant import (
    hadamard_dynamic_quant,
    hadamard_quant,
    silu_mul_hadamard_dynamic_quant,
    silu_mul_hadamard_quant,
)
from mergequant.ops.int4x4_linear import int4x4_linear
from mergequant.ops.int_linear import int4_linear, int8_linear
from mergequant.ops.int_matmul import backend, int_matmul
from mergequant.ops.kronecker import kronecker_dynamic_quant, kronecker_transform
from mergequant.ops.kv_append import kv_append
from mergequant.ops.kv_attention import kv_attention, kv_read
from mergequant.ops.kv_pages import kv_page_attention, kv_page_read, kv_store
from mergequant.ops.norm_quant import layernorm_quant, rmsnorm_quant
from mergequant.ops.overlap import overlapping
from mergequant.ops.reassemble import reassemble
from mergequant.ops.silu_mul import silu_mul, silu_mul_dynamic_quant, silu_mul_quant
from mergequant.ops.sparse_dense_linear import decode_sparse, sparse_dense_linear
from mergequant.ops.static_quant import quantize_scaled, static_quant
from mergequant.ops.tiled_linear import tiled_linear, tiled_swiglu_quant
from mergequant.ops.tiles import interleave_rows, tile_weight, untile_weight
from mergequant.ops.two_level_linear import two_level_linear

__all__ = [
    "ARCHITECTURES",
    "Choice",
    "PreparedWeight",
    "Rotation",
    "add_rmsnorm",
    "add_rmsnorm_quant",
    "backend",
    "codebook_linear",
    "codebook_weight",
    "cpu_backend",
    "decode_sparse",
    "dynamic_quant",
    "explain",
    "hadamard_dynamic_quant",
    "hadamard_quant",
    "hadamard_transform",
    "int4_linear",
    "int4x4_linear",
    "int8_linear",
    "int_matmul",
    "interleave_rows",
    "kronecker_dynamic_quant",
    "kronecker_transform",
    "kv_append",
    "kv_attention",
    "kv_page_attention",
    "kv_page_read",
    "kv_read",
    "kv_store",
    "layernorm_quant",
    "overlapping",
    "prepare_weight",
    "prepared_linear",
    "quantize_scaled",
    "reassemble",
    "rmsnorm_quant",
    "rotation",
    "silu_mul",
    "silu_mul_dynamic_quant",
    "silu_mul_hadamard_dynamic_quant",
    "silu_mul_hadamard_quant",
    "silu_mul_quant",
    "sparse_dense_linear",
    "static_quant",
    "tile_weight",
    "tiled_linear",
    "tiled_swiglu_quant",
    "two_level_linear",
    "untile_weight",
]
