"""Suites of recipes that `benchmarks/accuracy.py` runs: label in the tables, registered name, settings."""

from typing import Any

__all__ = ["CMPQ_BITS", "KV_BITS", "SLOW", "SUITES", "Suite"]

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
_CLIPPED: dict[str, Any] = {**_GOOD, "input_clip": True}  # of tokens, by the output error; QLLM has no such search
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
    "smoothquant W6A6": ("smoothquant", {**_W6A6, **_GOOD, "alpha": 0.85}),
    "smoothquant W6A6, token clips": ("smoothquant", {**_W6A6, **_CLIPPED, "alpha": 0.85}),
    "smoothquant W4A4": ("smoothquant", {**_W4A4, **_GOOD, "alpha": 0.85}),
    "smoothquant W4A4, token clips": ("smoothquant", {**_W4A4, **_CLIPPED, "alpha": 0.85}),
    "outliertune W8A8": ("outliertune", _W8A8),
    "outliertune W6A6": ("outliertune", _W6A6),
    "outliertune W4A4": ("outliertune", _W4A4),
    f"{OS_PLUS} W8A8": (OS_PLUS, _W8A8),
    f"{OS_PLUS} W6A6": (OS_PLUS, {**_W6A6, **_GOOD}),
    f"{OS_PLUS} W6A6, token clips": (OS_PLUS, {**_W6A6, **_CLIPPED}),
    f"{OS_PLUS} W4A4": (OS_PLUS, {**_W4A4, **_GOOD}),
    f"{OS_PLUS} W4A4, token clips": (OS_PLUS, {**_W4A4, **_CLIPPED}),
    "qllm W6A6": ("qllm", {**_W6A6, **_GOOD}),
    "qllm W4A4": ("qllm", {**_W4A4, **_GOOD}),
    "qserve W4A8": ("qserve", {}),
    "quarot": ("quarot", {}),
    "quarot, clip search, Hessian of codes, prefix": ("quarot", _EXTRAS),
    "spinquant": ("spinquant", {}),
    "flatquant": ("flatquant", {}),
    "flatquant, prefix": ("flatquant", {"prefix": "bos"}),
    "flatquant, prefix, random start": ("flatquant", {"prefix": "bos", "start": "random"}),
    "prefixquant": ("prefixquant", {}),
    "mergequant": ("mergequant", {}),
    "mergequant-plus": (PLUS, {}),
    "mergequant-plus, o/d with token scales": (PLUS, {"other": "hadamard"}),
    "mergequant-plus, fine-tuned": (PLUS, {"fine_tune": 4}),
    "mergequant-w4a8": ("mergequant-w4a8", {}),
}
# Weights alone. Codes that do not fill bytes are packed without a gap everywhere, so that stored bits can be compared.
_DENSE: dict[str, Any] = {"round.dense": True}
_W2: dict[str, Any] = {"weight_bits": 2, "zeros": True, "clip": True, **_DENSE}  # what a 2-bit baseline is given
_W3: dict[str, Any] = {"weight_bits": 3, "zeros": True, "clip": False, **_DENSE}  # the grids of quantease and dmmv
_ROWS: dict[str, Any] = {"activation_bits": 16, "group_size": 0}
_V4: dict[str, Any] = {"vector": 4, "bits": 8}
_SMALL_SHARE: dict[str, Any] = {"largest_share": 0.005}
CMPQ_BITS = (2.0, 2.2, 2.6, 3.0, 3.4, 4.0)
WEIGHTS: Suite = {
    "rtn W4": ("rtn", _ROWS),
    "rtn W3": ("rtn", {**_ROWS, "weight_bits": 3, **_DENSE}),
    "rtn W2 g128": ("rtn", {**_W2, "activation_bits": 16, "group_size": 128}),
    "rtn W2 g64": ("rtn", {**_W2, "activation_bits": 16, "group_size": 64}),
    "gptq W4": ("gptq", {}),
    "gptq W3": ("gptq", _W3),
    "gptq W3, natural order": ("gptq", {**_W3, "activation_order": False}),
    "gptq W3, clipped": ("gptq", {**_W3, "clip": True}),
    "gptq W2 g128": ("gptq", {**_W2, "group_size": 128}),
    "gptq W2 g64": ("gptq", {**_W2, "group_size": 64}),
    "gptq, 2.2 bits": ("gptq", {"average_bits": 2.2}),
    "gptq, 3.4 bits": ("gptq", {"average_bits": 3.4}),
    "gptq, 4.6 bits": ("gptq", {"average_bits": 4.6}),
    "quantease W4": ("quantease", {"weight_bits": 4}),
    "quantease W3": ("quantease", {}),
    "quantease W3, from gptq": ("quantease", {"start": "gptq", "sweeps": 10, "activation_order": True}),
    "quantease W3 + 1 %": ("quantease", {"outliers": 0.01}),
    "quantease W3 + 1 % columns": ("quantease", {"outliers": 0.01, "whole_columns": True}),
    "spqr W2": ("spqr", {"weight_bits": 2}),
    "spqr W3 + 0.5 %": ("spqr", _SMALL_SHARE),
    "spqr W3": ("spqr", {}),
    "spqr W4 g32 + 0.5 %": ("spqr", {**_SMALL_SHARE, "weight_bits": 4, "group_size": 32}),
    "spqr W4": ("spqr", {"weight_bits": 4}),
    "gwq W3": ("gwq", {}),
    "gwq W3, magnitude": ("gwq", {"outliers": "magnitude"}),
    "gwq W3, random": ("gwq", {"outliers": "random"}),
    "gwq W3, none": ("gwq", {"outliers": "none"}),
    "gwq W3, gptq": ("gwq", {"rounding": "gptq"}),
    "gwq W3, gptq, by error": ("gwq", {"rounding": "gptq", "outliers": "error"}),
    "adadim W3": ("adadim", {}),
    "adadim W3, rows": ("adadim", {"axis": "row"}),
    "adadim W3, columns": ("adadim", {"axis": "column"}),
    "adadim W3 rtn": ("adadim", {"rounding": "rtn"}),
    "adadim W3 rtn, rows": ("adadim", {"rounding": "rtn", "axis": "row"}),
    "adadim W3 rtn, columns": ("adadim", {"rounding": "rtn", "axis": "column"}),
    "powerquant W4": ("powerquant", {}),
    "powerquant W4, gptq": ("powerquant", {"rounding": "gptq"}),
    "powerquant W3": ("powerquant", {"weight_bits": 3}),
    "nupes W4": ("nupes", {}),
    "nupes W3": ("nupes", {"weight_bits": 3}),
    "vptq v4k256": ("vptq", _V4),
    "vptq v8k256+256": ("vptq", {"vector": 8, "bits": 8, "residual_bits": 8}),
    "vptq v4k256+16": ("vptq", {**_V4, "residual_bits": 4}),
    **{f"cmpq, {bits:.1f} bits": ("cmpq", {"average_bits": bits}) for bits in CMPQ_BITS},
    "dmmv W3": ("dmmv", {}),
    "hqq W4 g64": ("hqq", {}),
    "hqq W3 g64": ("hqq", {"weight_bits": 3}),
    "autoround W4 g128": ("autoround", {}),
    "autoround W3 g128": ("autoround", {"weight_bits": 3}),
    "autoround W2 g128": ("autoround", {"weight_bits": 2}),
}
SLOW = (
    "spinquant",
    "flatquant",
    "qllm",
    "nupes",
    "vptq",
    "dmmv",
    "autoround",
    "spqr",
    "quantease",
)  # recipes that take long: started first, so that nobody waits for them at the end
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
