"""Steps that scale channels before anything is rounded or clip weights: SmoothQuant, AWQ, Outlier Suppression+."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mergequant.calibration import SiteContext
from mergequant.errors import RecipeError
from mergequant.grids import AbsMax, IntegerGrid, Quantizer, fitting_group
from mergequant.solvers import rtn
from mergequant.steps.base import SiteStep
from mergequant.steps.channel import tie_channels
from mergequant.steps.module_output import LinearOutput, ModuleOutput
from mergequant.transforms import (
    FloatScheme,
    InputScheme,
    TensorScheme,
    TokenScheme,
    activation_aware_scale,
    clip_groups,
    smoothing_scale,
    threshold_scale,
)

__all__ = ["ClipWeights", "ScaleChannels"]

FLOAT_BITS = 16


@dataclass(frozen=True)
class ScaleChannels(SiteStep):
    """Divide a site's channels by s in what feeds it, multiply the columns of its weights by s.

    With several exponents the one is taken that changes the output of the module behind the site least, with rounded
    weights (and inputs, at less than 16 bits). A site with nothing in front that could take up a scale is left alone,
    and its figures say so (`scaled` = 0). Put this step before all others.

    Attributes:
        rule: "smooth": s = max|X|^e / max|W|^(1 - e) (SmoothQuant); "aware": s = mean|X|^e, normalized (AWQ);
            "threshold": s = max(1, max|X| / t), with t = e max|X| over all channels (Outlier Suppression+).
        exponents: e; several are searched. For "threshold" a share, above 0.
        weight_bits, group_size, activation_bits: how the search rounds: to the nearest code; activation_bits = 16
            leaves inputs alone, else they get a scale per token, or one static step that covers all (`inputs`).
            group_size 0 = a scale per row.
        chunks: calibration chunks (of about 4096 tokens) that the search looks at.
    """

    name: ClassVar[str] = "scale_channels"
    rule: Literal["smooth", "aware", "threshold"] = "smooth"
    exponents: tuple[float, ...] = (0.5,)
    weight_bits: int = 8
    group_size: int = 0
    activation_bits: int = FLOAT_BITS
    chunks: int = 1
    inputs: Literal["token", "tensor"] = "token"

    def __post_init__(self) -> None:
        if not self.exponents or not all(0 <= exponent <= 1 for exponent in self.exponents):
            raise RecipeError(f"scale_channels: exponents {self.exponents} must be numbers between 0 and 1")
        if self.rule not in ("smooth", "aware", "threshold"):
            raise RecipeError(f"scale_channels: rule {self.rule!r} is not 'smooth', 'aware' or 'threshold'")
        if self.rule == "threshold" and 0 in self.exponents:
            raise RecipeError("scale_channels: a threshold of 0 would scale by infinity; give shares above 0")
        if self.inputs not in ("token", "tensor") or (self.inputs == "tensor" and self.rule == "aware"):
            raise RecipeError(
                f"scale_channels: inputs {self.inputs!r} is not 'token' or 'tensor'; rule 'aware' knows no range, and "
                "so no step for the tensor"
            )
        if self.chunks < 1:
            raise RecipeError(f"scale_channels: chunks {self.chunks} must be positive")

    def run(self, context: SiteContext) -> None:
        context.report(scaled=float(context.can_scale))
        if not context.can_scale:
            return
        inputs = self._inputs(context)
        weights = tie_channels(context, context.stacked_weight().abs().amax(0))
        scales = {exponent: self._scale(inputs, weights, exponent) for exponent in self.exponents}
        best = self.exponents[0]
        if len(scales) > 1:
            losses = self._losses(context, scales, inputs)
            best = min(losses, key=lambda exponent: losses[exponent])
            context.report(scale_loss=losses[best], scale_loss_first=losses[self.exponents[0]])
        context.report(scale_exponent=best, largest_scale=float(scales[best].max()))
        context.scale_channels(scales[best])

    def _scale(self, inputs: Tensor, weights: Tensor, exponent: float) -> Tensor:
        if self.rule == "smooth":
            return smoothing_scale(inputs, weights, exponent)
        rule = threshold_scale if self.rule == "threshold" else activation_aware_scale
        return rule(inputs, exponent)

    def _inputs(self, context: SiteContext) -> Tensor:
        """Largest or mean magnitude of every channel; channels that one producer row feeds share the largest."""
        total = torch.zeros(context.site.width, dtype=torch.float64, device=context.block.device)
        tokens = 0
        for chunk in context.chunks():
            tokens += chunk.shape[0]
            if self.rule == "aware":
                total += chunk.abs().double().sum(0)
            else:
                total = torch.maximum(total, chunk.abs().amax(0).double())
        found = total / max(tokens, 1) if self.rule == "aware" else total
        return tie_channels(context, found.float())

    def _losses(self, context: SiteContext, scales: Mapping[float, Tensor], inputs: Tensor) -> dict[float, float]:
        """What each scale costs, seen from the unscaled site: weights Q(W s) / s, inputs q(x / s) s."""
        group = fitting_group(context.site.width, self.group_size)
        quantizer = Quantizer(IntegerGrid(self.weight_bits), group or None, AbsMax())
        judge = ModuleOutput if context.site.begins_module else LinearOutput
        output = judge(context, self.chunks)
        losses = {}
        for exponent, scale in scales.items():
            scheme = self._scheme(inputs / scale)
            rounded = {
                name: rtn(weight * scale, quantizer).quantized.decode() / scale
                for name, weight in context.weights.items()
            }
            unit = scheme.step if isinstance(scheme, TensorScheme) else 1.0

            def values(x: Tensor, scale: Tensor = scale, scheme: InputScheme = scheme, unit: float = unit) -> Tensor:
                return scheme.values(x / scale) * unit * scale

            losses[exponent] = output.loss(rounded, values)
        return losses

    def _scheme(self, inputs: Tensor) -> FloatScheme | TokenScheme | TensorScheme:
        """How the search rounds inputs whose channels reach up to `inputs` (width,)."""
        if self.activation_bits >= FLOAT_BITS:
            return FloatScheme()
        if self.inputs == "token":
            return TokenScheme(self.activation_bits)
        largest = max(float(inputs.max()), torch.finfo(torch.float32).tiny)
        return TensorScheme(self.activation_bits, largest / IntegerGrid(self.activation_bits).high)


@dataclass(frozen=True)
class ClipWeights(SiteStep):
    """AWQ's weight clipping: the range of every row and group that costs least at the group's own output.

    Queries and keys are left alone, since attention multiplies their errors. They are told by structure: of a site
    where attention begins, only the rows that are proven to feed the attention's output are clipped.

    Attributes:
        weight_bits, group_size: of the rounding that follows (with absmax ranges).
        least, steps: smallest share of the range, number of shares tried.
    """

    name: ClassVar[str] = "clip_weights"
    weight_bits: int = 4
    group_size: int = 0
    least: float = 0.55
    steps: int = 10

    def __post_init__(self) -> None:
        if not 0 < self.least <= 1 or self.steps < 1:
            raise RecipeError(f"clip_weights: least {self.least} must be in (0, 1] and steps {self.steps} positive")

    def run(self, context: SiteContext) -> None:
        group = fitting_group(context.site.width, self.group_size)
        quantizer = Quantizer(IntegerGrid(self.weight_bits), group or None, AbsMax())
        gram = context.gram().total
        targets = {name: context.scheme.fold(weight).clone() for name, weight in context.weights.items()}
        clamped = total = 0
        for name, rows in clippable_rows(context).items():
            part = targets[name][rows]
            clipped = clip_groups(part, gram, quantizer, least=self.least, steps=self.steps)
            clamped += int((clipped != part).sum())
            total += part.numel()
            targets[name][rows] = clipped
        context.targets = targets
        context.report(clamped_weights=clamped / max(total, 1))


def clippable_rows(context: SiteContext) -> dict[str, slice]:
    """Rows of the consumers whose output attention does not multiply by another's."""
    sites = context.block.structure.sites
    behind = sites[sites.index(context.site) + 1 :]
    if not context.site.begins_module or not behind or behind[0].kind != "attention_output":
        return {name: slice(None) for name in context.site.consumers}
    producer = behind[0].producer
    if producer is None or producer.rows.linear not in context.site.consumers:
        return {}
    return {producer.rows.linear: slice(producer.rows.start, producer.rows.stop)}
