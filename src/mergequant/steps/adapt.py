"""Groups along rows or down columns, chosen for each linear (AdaDim)."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mergequant.calibration import SiteContext
from mergequant.errors import RecipeError
from mergequant.grids import fitting_group
from mergequant.solvers import Descent, Solution, across, across_descent, invert_hessian, output_error
from mergequant.steps.module_output import LinearOutput, ModuleOutput
from mergequant.steps.rounding import Round
from mergequant.transforms import FloatScheme

__all__ = ["AdaptiveRound"]

Axis = Literal["row", "column"]


@dataclass(frozen=True)
class AdaptiveRound(Round):
    """Round each linear of a site in groups along its rows or down its columns, whichever costs less.

    Attributes:
        axis: "adaptive", or the same for all: "row" (per output channel), "column" (per input channel).
        judge: "module" compares both, rounded to nearest, at the output of the module behind the site, one linear after
            the other, the earlier ones rounded on both sides (the paper's rule); "layer" compares the linear's own
            output error after the very rounding that is stored, so it is never above the better of the two.
        chunks: calibration chunks that modules are run on.
    """

    name: ClassVar[str] = "adaptive_round"
    axis: Literal["adaptive", "row", "column"] = "adaptive"
    judge: Literal["module", "layer"] = "module"
    chunks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels != 1 or self.chunks < 1:
            raise RecipeError(f"adaptive_round: levels {self.levels} must be 1 and chunks {self.chunks} positive")

    def run(self, context: SiteContext) -> None:
        if not isinstance(context.scheme, FloatScheme) or context.rotation or context.transform is not None:
            raise RecipeError(
                f"{context.name}: scales down the columns need an input in floating point, as the block gives it; "
                "leave out the steps that quantize or rotate it, or round by gptq"
            )
        super().run(context)

    def solve_site(self, context: SiteContext, gram: Tensor | None) -> dict[str, Solution]:
        if self.axis == "adaptive" and self.judge == "module":
            axes = self._by_module(context)
            solved = {name: self._rounded(context, name, gram, axis) for name, axis in axes.items()}
        else:
            solved, axes = self._by_layer(context, gram)
        context.report(columns=sum(axis == "column" for axis in axes.values()) / len(axes))
        return solved

    def _by_layer(self, context: SiteContext, gram: Tensor | None) -> tuple[dict[str, Solution], dict[str, Axis]]:
        solved: dict[str, Solution] = {}
        axes: dict[str, Axis] = {}
        total = context.gram().total if gram is None else gram
        wanted: tuple[Axis, ...] = ("row", "column") if self.axis == "adaptive" else (self.axis,)
        for name, weight in (context.targets or {}).items():
            least = torch.inf
            for axis in wanted:
                solution = self._rounded(context, name, gram, axis)
                error = output_error(solution.quantized.decode() - weight, total)
                if error < least or name not in solved:
                    solved[name], axes[name], least = solution, axis, error
        return solved, axes

    def _by_module(self, context: SiteContext) -> dict[str, Axis]:
        """Both forms of every linear, rounded to nearest, in the module that is rounded so far."""
        axes: dict[str, Axis] = {}
        output = (ModuleOutput if context.site.begins_module else LinearOutput)(context, self.chunks)
        nearest, now = replace(self, method="rtn"), dict(context.weights)
        for name in context.site.consumers:
            output.rebase(now)
            tried: dict[Axis, Tensor] = {
                axis: nearest._rounded(context, name, None, axis).quantized.decode() for axis in ("row", "column")
            }
            losses = {axis: output.loss({**now, name: weight}) for axis, weight in tried.items()}
            axes[name] = "column" if losses["column"] < losses["row"] else "row"
            now[name] = tried[axes[name]]
        return axes

    def _rounded(self, context: SiteContext, name: str, gram: Tensor | None, axis: Axis) -> Solution:
        weight = (context.targets or context.weights)[name]
        if axis == "row":
            return self.solve(weight, gram, self.group_of(weight.shape[1]) or None)
        group = fitting_group(weight.shape[0], self.group_size) if self.fit_groups else self.group_size
        quantizer = self.quantizer(group or None)
        if gram is None:
            return across(weight, None, quantizer)
        first = across(weight, invert_hessian(gram, damping=self.damping), quantizer)
        if self.method != "quantease":
            return first
        return across_descent(weight, gram, first, Descent("gptq", self.sweeps, False, self.activation_order))
