"""Suites of recipes that `benchmarks/accuracy.py` runs: label in the tables, registered name, settings."""

from typing import Any

__all__ = ["KV_BITS", "SLOW", "SUITES", "Suite"]

Suite = dict[str, tuple[str, dict[str, Any]]]

PLUS = "mergequant-plus"
MAIN: Suite = {
    "gptq W4A16": ("gptq", {}),
    "gptq W4A4 per token": ("gptq", {"activation_bits": 4}),
    "rtn W4A4 per token": ("rtn", {}),
    "mergequant": ("mergequant", {}),
    "mergequant-plus": (PLUS, {}),
    "mergequant-plus, o/d int8 by QSM": (PLUS, {"other": "static", "other_bits": 8}),
    "mergequant-w4a8": ("mergequant-w4a8", {}),
}
ABLATIONS: Suite = {
    "mergequant: 5 % split everywhere": ("mergequant", {"split": 0.05}),
    "mergequant: no split": ("mergequant", {"split": 0.0}),
    "mergequant: no clip": ("mergequant", {"clip": "none"}),
    "mergequant: no compensation": ("mergequant", {"compensation": "none"}),
    "mergequant: low-rank compensation": ("mergequant", {"compensation": "low_rank"}),
    "mergequant: RTN instead of GPTQ": ("mergequant", {"rounding": "rtn"}),
    "plus: no split": (PLUS, {"split": 0.0}),
    "plus: no clip": (PLUS, {"clip": "none"}),
    "plus: no stagger": (PLUS, {"stagger": False}),
    "plus: RTN instead of GPTQ": (PLUS, {"rounding": "rtn"}),
    "plus: prune instead of pad": (PLUS, {"width": "prune"}),
    "plus: no prefix": (PLUS, {"prefix": "none", "allow_no_prefix": True}),
    "plus: no compensation": (PLUS, {"compensation": "none"}),
    "plus: low-rank compensation": (PLUS, {"compensation": "low_rank"}),
    "plus: pad 128": (PLUS, {"tile": 128}),
    "plus: o/d Hadamard with token scales, no prefix": (PLUS, {"other": "hadamard", "prefix": "none"}),
    "plus: o/d int4 by QSM": (PLUS, {"other": "static"}),
    "w4a8: no split": ("mergequant-w4a8", {"split": 0.0}),
    "w4a8: no prefix": ("mergequant-w4a8", {"prefix": "none", "allow_no_prefix": True}),
    "w4a8: o/d by QSM, no Hadamard": ("mergequant-w4a8", {"other": "static"}),
}
_W4A4: dict[str, Any] = {"weight_bits": 4, "activation_bits": 4}
_W6A6: dict[str, Any] = {"weight_bits": 6, "activation_bits": 6}
_W8A8: dict[str, Any] = {"weight_bits": 8, "activation_bits": 8}
_GOOD: dict[str, Any] = {"rounding": "gptq", "clip": True}  # what a 4-bit baseline is given, whatever its paper did
_CLIPPED: dict[str, Any] = {**_GOOD, "input_clip": True}
_EXTRAS: dict[str, Any] = {"activation_clip": "search", "hessian": "quantized", "prefix": "bos"}
OS_PLUS = "outlier-suppression-plus"
# The channel family and its rivals; what the labels of `MAIN` name is the same here.
FAMILY: Suite = {
    "rtn W4A4 per token": ("rtn", {}),
    "gptq W4A16": ("gptq", {}),
    "gptq W4A16, channels scaled, prefix": ("awq", {"group_size": 0, "rounding": "gptq", "prefix": "bos"}),
    "awq W4A16, groups of 128": ("awq", {}),
    "awq W4A16, rows": ("awq", {"group_size": 0}),
    "smoothquant W8A8": ("smoothquant", {"alpha": 0.85}),
    "smoothquant W6A6": ("smoothquant", {**_W6A6, **_CLIPPED, "alpha": 0.85}),
    "smoothquant W4A4": ("smoothquant", {**_W4A4, **_CLIPPED, "alpha": 0.85}),
    "outliertune W8A8": ("outliertune", _W8A8),
    "outliertune W6A6": ("outliertune", _W6A6),
    "outliertune W4A4": ("outliertune", _W4A4),
    f"{OS_PLUS} W8A8": (OS_PLUS, _W8A8),
    f"{OS_PLUS} W6A6": (OS_PLUS, {**_W6A6, **_CLIPPED}),
    f"{OS_PLUS} W4A4": (OS_PLUS, {**_W4A4, **_CLIPPED}),
    "qllm W6A6": ("qllm", {**_W6A6, **_GOOD}),
    "qllm W4A4": ("qllm", {**_W4A4, **_GOOD}),
    "qserve W4A8": ("qserve", {}),
    "quarot": ("quarot", {}),
    "quarot, clip search, Hessian of codes, prefix": ("quarot", _EXTRAS),
    "spinquant": ("spinquant", {}),
    "flatquant": ("flatquant", {}),
    "flatquant, prefix": ("flatquant", {"prefix": "bos"}),
    "prefixquant": ("prefixquant", {}),
    "mergequant": ("mergequant", {}),
    "mergequant-plus": (PLUS, {}),
    "mergequant-w4a8": ("mergequant-w4a8", {}),
}
# Weights alone, at their papers' widths, beside rounding and GPTQ at the same ones.
WEIGHTS: Suite = {
    "rtn W4, groups of 128": ("rtn", {"activation_bits": 16, "group_size": 128}),
    "gptq W4": ("gptq", {}),
    "gptq W3": ("gptq", {"weight_bits": 3}),
    "gptq W3, groups of 128": ("gptq", {"weight_bits": 3, "group_size": 128}),
    "gptq W2, groups of 128": ("gptq", {"weight_bits": 2, "group_size": 128}),
    "quantease W4": ("quantease", {"weight_bits": 4}),
    "quantease W3": ("quantease", {}),
    "quantease W3, 1 % outliers": ("quantease", {"outliers": 0.01}),
    "quantease W3, 1 % outlier columns": ("quantease", {"outliers": 0.01, "whole_columns": True}),
    "quantease W3, polishing GPTQ": ("quantease", {"start": "gptq", "sweeps": 10}),
    "spqr W3": ("spqr", {}),
    "spqr W3, damping 0.01": ("spqr", {"damping": 0.01}),
    "spqr W4, damping 0.01": ("spqr", {"weight_bits": 4, "damping": 0.01}),
    "gwq W3": ("gwq", {}),
    "gwq W3, 16 samples": ("gwq", {"samples": 16}),
    "adadim W3": ("adadim", {}),
    "adadim W3, rows": ("adadim", {"axis": "row"}),
    "adadim W3, RTN": ("adadim", {"rounding": "rtn"}),
    "powerquant W4": ("powerquant", {}),
    "powerquant W4, GPTQ": ("powerquant", {"rounding": "gptq"}),
    "nupes W4": ("nupes", {}),
    "vptq, 2 bits": ("vptq", {}),
    "cmpq, 3 bits": ("cmpq", {}),
    "cmpq, 2.2 bits": ("cmpq", {"average_bits": 2.2}),
    "dmmv W3": ("dmmv", {}),
    "hqq W4, groups of 64": ("hqq", {}),
    "hqq W3, groups of 64": ("hqq", {"weight_bits": 3}),
    "autoround W4, groups of 128": ("autoround", {}),
    "autoround W3, groups of 128": ("autoround", {"weight_bits": 3}),
}
SLOW = (
    "spinquant",
    "flatquant",
    "qllm",
    "nupes",
    "vptq",
    "dmmv",
    "autoround",
)  # recipes that learn: started first, so that nobody waits for them at the end
KV: Suite = {"mergequant-w4a8": MAIN["mergequant-w4a8"], PLUS: MAIN[PLUS]}
SUITES = {
    "main": MAIN,
    "ablations": ABLATIONS,
    "all": {**MAIN, **ABLATIONS},
    "kv": KV,
    "family": FAMILY,
    "weights": WEIGHTS,
}
KV_BITS = {"kv": (16, 8, 4)}  # of other suites: 16 only
