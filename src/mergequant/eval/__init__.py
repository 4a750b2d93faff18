"""Measure quality: perplexity, distance to the float model, size, zero-shot tasks."""

from mergequant.eval.evaluate import KV_CHOICES, evaluate, load_model, load_tokenizer
from mergequant.eval.perplexity import Divergence, Likelihood, Scores, score
from mergequant.eval.report import FLOAT_KV_BITS, ModelReport, Report, human_bytes, results_table
from mergequant.eval.size import Size, folder_size, memory_size

__all__ = [
    "FLOAT_KV_BITS",
    "KV_CHOICES",
    "Divergence",
    "Likelihood",
    "ModelReport",
    "Report",
    "Scores",
    "Size",
    "evaluate",
    "folder_size",
    "human_bytes",
    "load_model",
    "load_tokenizer",
    "memory_size",
    "results_table",
    "score",
]
