"""mergequant: accurate 4-bit static quantization of large language models (MergeQuant, arXiv 2503.07654)."""

__version__ = "0.1.0"
