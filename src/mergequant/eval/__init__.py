"""Measure quality: perplexity, distance to the float model, size, zero-shot tasks."""

from mergequant.eval.evaluate import evaluate
from mergequant.eval.perplexity import Divergence, Likelihood, Scores, score
from mergequant.eval.report import ModelReport, Report, results_table
from mergequant.eval.size import Size, folder_size, memory_size

__all__ = [
    "Divergence",
    "Likelihood",
    "ModelReport",
    "Report",
    "Scores",
    "Size",
    "evaluate",
    "folder_size",
    "memory_size",
    "results_table",
    "score",
]
