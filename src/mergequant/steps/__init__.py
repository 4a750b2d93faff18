"""Steps: the passes that recipes are made of."""

from mergequant.steps.adapt import AdaptiveRound
from mergequant.steps.allocate import AllocateBits
from mergequant.steps.attention import Reorder, RotateKeys, SmoothAttention
from mergequant.steps.base import (
    ALL_SITES,
    BlockStep,
    LearningStep,
    MeasuringStep,
    ModelStep,
    SiteStep,
    Step,
    fitting,
    near_name,
    step_from_dict,
)
from mergequant.steps.channel import Clip, Prune, Ranges, Split
from mergequant.steps.codebooks import RoundChannels, RoundCodebooks, RoundVectors
from mergequant.steps.compensate import Compensate
from mergequant.steps.flatten import Flatten
from mergequant.steps.half_quadratic import RoundHalfQuadratic
from mergequant.steps.judge import Judge, RoundingName
from mergequant.steps.learn_rotations import LearnRotations
from mergequant.steps.learn_rounding import LearnRounding, RoundLearned
from mergequant.steps.low_rank import LowRank
from mergequant.steps.min_max import RoundMinMax
from mergequant.steps.power import PowerRound, SearchExponent
from mergequant.steps.reassemble import Reassemble
from mergequant.steps.residual import MixHeads, RotateResidual
from mergequant.steps.rounding import Round
from mergequant.steps.scale import ClipWeights, ScaleChannels
from mergequant.steps.shift import ShiftChannels
from mergequant.steps.sparse import OutlierChoice, RoundSparse, WeightGradients
from mergequant.steps.tune import TuneBlock
from mergequant.steps.whole import Rotate, TensorInput, TokenInput

__all__ = [
    "ALL_SITES",
    "AdaptiveRound",
    "AllocateBits",
    "BlockStep",
    "Clip",
    "ClipWeights",
    "Compensate",
    "Flatten",
    "Judge",
    "LearnRotations",
    "LearnRounding",
    "LearningStep",
    "LowRank",
    "MeasuringStep",
    "MixHeads",
    "ModelStep",
    "OutlierChoice",
    "PowerRound",
    "Prune",
    "Ranges",
    "Reassemble",
    "Reorder",
    "Rotate",
    "RotateKeys",
    "RotateResidual",
    "Round",
    "RoundChannels",
    "RoundCodebooks",
    "RoundHalfQuadratic",
    "RoundLearned",
    "RoundMinMax",
    "RoundSparse",
    "RoundVectors",
    "RoundingName",
    "ScaleChannels",
    "SearchExponent",
    "ShiftChannels",
    "SiteStep",
    "SmoothAttention",
    "Split",
    "Step",
    "TensorInput",
    "TokenInput",
    "TuneBlock",
    "WeightGradients",
    "fitting",
    "near_name",
    "step_from_dict",
]
