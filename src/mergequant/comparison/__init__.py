"""Many recipes on one model, on the same ground: quantized, measured, and laid side by side in one table."""

from mergequant.comparison.report import Comparison
from mergequant.comparison.run import compare

__all__ = ["Comparison", "compare"]
