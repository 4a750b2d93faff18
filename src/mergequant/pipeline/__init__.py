"""The pipeline: a float model and a recipe become a verified checkpoint."""

from mergequant.pipeline.plan import Plan, SitePlan, make_plan
from mergequant.pipeline.run import Quantized, Reporter, plan, quantize

__all__ = ["Plan", "Quantized", "Reporter", "SitePlan", "make_plan", "plan", "quantize"]
