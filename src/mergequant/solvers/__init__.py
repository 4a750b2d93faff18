"""Solvers: a float weight and statistics become codes. Tensors in, tensors out; no model classes."""

from mergequant.solvers.across import across, across_descent
from mergequant.solvers.allocation import allocate
from mergequant.solvers.channel_bits import allocate_channels, allocate_greedily, channel_levels, outlier_mask
from mergequant.solvers.coordinate_descent import Descent, OutlierShare, descend, quantease, quantease_outliers
from mergequant.solvers.dmmv import MinMaxProblem, MinMaxSearch, MinMaxSolution, min_max_search
from mergequant.solvers.gram import GramSum
from mergequant.solvers.half_quadratic import HalfQuadratic, half_quadratic
from mergequant.solvers.kmeans import cluster_sums, kmeans, nearest
from mergequant.solvers.least_squares import least_squares_weight
from mergequant.solvers.power import LearnedPower, exponent_losses, learn_power, search_exponent
from mergequant.solvers.rounding import Solution, gptq, output_error, rtn
from mergequant.solvers.spqr import SparseGroups, spqr, strongest
from mergequant.solvers.sweep import InverseFactor, invert_hessian, sweep
from mergequant.solvers.two_level import two_level
from mergequant.solvers.vector_gptq import CodebookSolution, Section, code_columns, find_books, tune_books, vector_gptq

__all__ = [
    "CodebookSolution",
    "Descent",
    "GramSum",
    "HalfQuadratic",
    "InverseFactor",
    "LearnedPower",
    "MinMaxProblem",
    "MinMaxSearch",
    "MinMaxSolution",
    "OutlierShare",
    "Section",
    "Solution",
    "SparseGroups",
    "across",
    "across_descent",
    "allocate",
    "allocate_channels",
    "allocate_greedily",
    "channel_levels",
    "cluster_sums",
    "code_columns",
    "descend",
    "exponent_losses",
    "find_books",
    "gptq",
    "half_quadratic",
    "invert_hessian",
    "kmeans",
    "learn_power",
    "least_squares_weight",
    "min_max_search",
    "nearest",
    "outlier_mask",
    "output_error",
    "quantease",
    "quantease_outliers",
    "rtn",
    "search_exponent",
    "spqr",
    "strongest",
    "sweep",
    "tune_books",
    "two_level",
    "vector_gptq",
]
