"""Solvers: a float weight and statistics become codes. Tensors in, tensors out; no model classes."""

from mergequant.solvers.gram import GramSum
from mergequant.solvers.least_squares import least_squares_weight
from mergequant.solvers.rounding import Solution, gptq, output_error, rtn
from mergequant.solvers.sweep import InverseFactor, invert_hessian, sweep
from mergequant.solvers.two_level import two_level

__all__ = [
    "GramSum",
    "InverseFactor",
    "Solution",
    "gptq",
    "invert_hessian",
    "least_squares_weight",
    "output_error",
    "rtn",
    "sweep",
    "two_level",
]
