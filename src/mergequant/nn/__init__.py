"""Modules of a quantized model. Inference only: imports nothing from the floors of calibration."""

from mergequant.nn.base import QuantModule
from mergequant.nn.codebook import CodebookLinear
from mergequant.nn.kv_scales import KVScales
from mergequant.nn.linear import InputQuantizer, QuantLinear
from mergequant.nn.norm import QuantNorm
from mergequant.nn.prefix import PrefixStore
from mergequant.nn.sparse import OutlierStore, SparseLinear
from mergequant.nn.spec import (
    CodebookSpec,
    InputSpec,
    KVSpec,
    LinearSpec,
    NormSpec,
    PartSpec,
    PrefixSpec,
    SparseSpec,
    Spec,
    spec_from_dict,
)

__all__ = [
    "CodebookLinear",
    "CodebookSpec",
    "InputQuantizer",
    "InputSpec",
    "KVScales",
    "KVSpec",
    "LinearSpec",
    "NormSpec",
    "OutlierStore",
    "PartSpec",
    "PrefixSpec",
    "PrefixStore",
    "QuantLinear",
    "QuantModule",
    "QuantNorm",
    "SparseLinear",
    "SparseSpec",
    "Spec",
    "build_module",
    "spec_from_dict",
]


def build_module(spec: LinearSpec | NormSpec) -> QuantLinear | QuantNorm:
    """The module that a layer's description calls for, with empty buffers."""
    if isinstance(spec, CodebookSpec):
        return CodebookLinear(spec)
    if isinstance(spec, SparseSpec):
        return SparseLinear(spec)
    return QuantNorm(spec) if isinstance(spec, NormSpec) else QuantLinear(spec)
