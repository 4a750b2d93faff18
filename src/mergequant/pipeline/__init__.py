"""The pipeline: a float model and a recipe become a verified checkpoint."""

from mergequant.pipeline.plan import Plan, SitePlan, make_plan
from mergequant.pipeline.run import Quantized, Reporter, Silent, code_digest, plan, quantize

__all__ = ["Plan", "Quantized", "Reporter", "Silent", "SitePlan", "code_digest", "make_plan", "plan", "quantize"]
