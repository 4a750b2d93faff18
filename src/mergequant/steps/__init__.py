"""Steps: the passes that recipes are made of."""

from mergequant.steps.attention import Reorder, SmoothAttention
from mergequant.steps.base import (
    ALL_SITES,
    BlockStep,
    LearningStep,
    ModelStep,
    SiteStep,
    Step,
    fitting,
    near_name,
    step_from_dict,
)
from mergequant.steps.channel import Clip, Prune, Ranges, Split
from mergequant.steps.compensate import Compensate
from mergequant.steps.flatten import Flatten
from mergequant.steps.judge import Judge
from mergequant.steps.learn_rotations import LearnRotations
from mergequant.steps.low_rank import LowRank
from mergequant.steps.reassemble import Reassemble
from mergequant.steps.residual import MixHeads, RotateResidual
from mergequant.steps.rounding import Round
from mergequant.steps.scale import ClipWeights, ScaleChannels
from mergequant.steps.shift import ShiftChannels
from mergequant.steps.tune import TuneBlock
from mergequant.steps.whole import Rotate, TensorInput, TokenInput

__all__ = [
    "ALL_SITES",
    "BlockStep",
    "Clip",
    "ClipWeights",
    "Compensate",
    "Flatten",
    "Judge",
    "LearnRotations",
    "LearningStep",
    "LowRank",
    "MixHeads",
    "ModelStep",
    "Prune",
    "Ranges",
    "Reassemble",
    "Reorder",
    "Rotate",
    "RotateResidual",
    "Round",
    "ScaleChannels",
    "ShiftChannels",
    "SiteStep",
    "SmoothAttention",
    "Split",
    "Step",
    "TensorInput",
    "TokenInput",
    "TuneBlock",
    "fitting",
    "near_name",
    "step_from_dict",
]
