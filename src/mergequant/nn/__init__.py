"""Modules of a quantized model. Inference only: imports nothing from the floors of calibration."""

from mergequant.nn.base import QuantModule
from mergequant.nn.kv_scales import KVScales
from mergequant.nn.linear import InputQuantizer, QuantLinear
from mergequant.nn.norm import QuantNorm
from mergequant.nn.prefix import PrefixStore
from mergequant.nn.spec import InputSpec, KVSpec, LinearSpec, NormSpec, PrefixSpec, Spec, spec_from_dict

__all__ = [
    "InputQuantizer",
    "InputSpec",
    "KVScales",
    "KVSpec",
    "LinearSpec",
    "NormSpec",
    "PrefixSpec",
    "PrefixStore",
    "QuantLinear",
    "QuantModule",
    "QuantNorm",
    "Spec",
    "build_module",
    "spec_from_dict",
]


def build_module(spec: LinearSpec | NormSpec) -> QuantLinear | QuantNorm:
    """The module that a layer's description calls for, with empty buffers."""
    return QuantNorm(spec) if isinstance(spec, NormSpec) else QuantLinear(spec)
