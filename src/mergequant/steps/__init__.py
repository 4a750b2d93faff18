"""Steps: the passes that recipes are made of."""

from mergequant.steps.base import ALL_SITES, BlockStep, ModelStep, SiteStep, Step, fitting, near_name, step_from_dict
from mergequant.steps.channel import Clip, Prune, Ranges, Split
from mergequant.steps.compensate import Compensate
from mergequant.steps.judge import Judge
from mergequant.steps.low_rank import LowRank
from mergequant.steps.residual import RotateResidual
from mergequant.steps.rounding import Round
from mergequant.steps.scale import ClipWeights, ScaleChannels
from mergequant.steps.whole import Rotate, TensorInput, TokenInput

__all__ = [
    "ALL_SITES",
    "BlockStep",
    "Clip",
    "ClipWeights",
    "Compensate",
    "Judge",
    "LowRank",
    "ModelStep",
    "Prune",
    "Ranges",
    "Rotate",
    "RotateResidual",
    "Round",
    "ScaleChannels",
    "SiteStep",
    "Split",
    "Step",
    "TensorInput",
    "TokenInput",
    "fitting",
    "near_name",
    "step_from_dict",
]
