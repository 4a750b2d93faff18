"""Rounding to small groups beside outliers (SpQR, GWQ), and the gradients that outliers may be chosen by."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from mergequant.calibration import SiteContext, StorePolicy
from mergequant.calibration.gradients import block_gradients
from mergequant.errors import RecipeError, StructureError
from mergequant.grids import SecondLevel, SparseTensor, fitting_group
from mergequant.models import ModelShell
from mergequant.solvers import Solution, SparseGroups, invert_hessian, spqr, strongest
from mergequant.steps.base import MeasuringStep, near_name
from mergequant.steps.judge import RoundingName
from mergequant.steps.rounding import Round

__all__ = ["OutlierChoice", "RoundSparse", "WeightGradients"]

OutlierChoice = Literal["error", "gradient", "magnitude", "hessian", "random", "none"]
MEASURED = "gradient."  # in front of a linear's name: its chosen weights among what is measured


@dataclass(frozen=True)
class WeightGradients(MeasuringStep):
    """The weights whose gradient of the language-model loss is largest: a share of every matrix.

    Attributes:
        share: of the weights that are chosen, by matrix.
        samples: calibration windows; 1 is what GWQ claims to be enough.
        accumulate: "squares": root of the sum of squares over windows; "signed": magnitude of the sum.
        times_weight: by |gradient * weight| instead of |gradient|.
    """

    name: ClassVar[str] = "weight_gradients"
    share: float = 0.01
    samples: int = 1
    accumulate: Literal["squares", "signed"] = "squares"
    times_weight: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.share < 1 or self.samples < 1:
            raise RecipeError(
                f"weight_gradients: share {self.share} must lie in (0, 1), samples {self.samples} be >= 1"
            )

    def check(self, shell: ModelShell) -> None:
        if not shell.generates:
            raise StructureError(
                f"{type(shell.model).__name__} predicts no next token, so there is no language-model loss and weights "
                "have no gradients; choose outliers=magnitude, or a recipe without gradients: spqr, smoothquant or gptq"
            )

    def measure(
        self, shell: ModelShell, windows: Tensor, policy: StorePolicy, progress: Callable[[str], None]
    ) -> dict[str, Tensor]:
        linears = [[name for site in structure.sites for name in site.consumers] for structure in shell.structures]
        signed, chosen = self.accumulate == "signed", {}
        parts = block_gradients(shell, windows[: self.samples], policy, linears, signed=signed, progress=progress)
        for index, gradients in parts:
            for name, size in gradients.items():
                weight = shell.blocks[index].get_submodule(name).get_parameter("weight").detach()
                score = size * weight.abs() if self.times_weight else size
                # A weight that no token reached (an expert's) has no gradient to go by; the larger ones come first.
                ranked = torch.where(score > 0, score, -1 / (1 + weight.abs().float()))
                places = strongest(ranked, self.share).flatten().nonzero()[:, 0]
                chosen[f"{MEASURED}{shell.block_names[index]}.{name}"] = places.to(torch.int32).cpu()
        return chosen


@dataclass(frozen=True)
class RoundSparse(Round):
    """Round a site's weights to groups with zero points, beside outliers that are stored as they are (`solvers.spqr`).

    Columns lie in the order of the sweep, so groups follow `activation_order`. `clip`, `hessian`, `zeros`, `levels` and
    what belongs to coordinate descent are not used.

    Attributes:
        method: "gptq" (SpQR's sweep) or "rtn".
        group_size: columns that share scale and zero point; where it does not divide a width, a smaller one that does.
        tile, statistic_bits: rows that share second-level grids of scales and zeros, bits of their codes; tile 0 = both
            are stored in 16 bits.
        whole_zeros: zero points are codes; else any number.
        chosen_by: how outliers are chosen. "error": by what they cost after all (SpQR; needs gptq); "gradient": by
            `weight_gradients`, which comes first; "magnitude"; "hessian": magnitude times the size of the input;
            "random" (a control); "none".
        share: of outliers, in every matrix, where they are not chosen by error.
        threshold, largest_share, leave_one_out: of outliers chosen by error (`solvers.spqr`).
    """

    name: ClassVar[str] = "round_sparse"
    method: RoundingName = "gptq"
    bits: int = 3
    group_size: int = 16
    clip: bool = False
    damping: float = 1.0
    fit_groups: bool = True
    zeros: bool = True
    tile: int = 16
    statistic_bits: int = 3
    whole_zeros: bool = False
    chosen_by: OutlierChoice = "error"
    share: float = 0.01
    threshold: float = 0.2
    largest_share: float = 0.01
    leave_one_out: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in ("gptq", "rtn") or self.levels != 1 or not self.zeros:
            raise RecipeError("round_sparse: weights with zero points are rounded by gptq or rtn, to one level")
        known = get_args(OutlierChoice)
        if self.chosen_by not in known:
            raise RecipeError(f"round_sparse: chosen_by {self.chosen_by!r}{near_name(self.chosen_by, known)}")
        if self.chosen_by == "error" and self.method == "rtn":
            raise RecipeError("round_sparse: outliers are chosen by error in a sweep; use gptq, or choose others")
        shares = self.share, self.largest_share
        if self.threshold <= 0 or not all(0 < share <= 1 for share in shares):
            raise RecipeError(f"round_sparse: threshold {self.threshold} must be positive, shares {shares} in (0, 1]")

    def group_of(self, width: int) -> int:
        return fitting_group(width, self.group_size)

    def solve_site(self, context: SiteContext, gram: Tensor | None) -> dict[str, Solution]:
        inverse = None
        if gram is not None:
            inverse = invert_hessian(gram, damping=self.damping, activation_order=self.activation_order)
        level = SecondLevel(self.tile, self.statistic_bits) if self.tile else None
        size = self.group_of(context.site.width) or None
        groups = SparseGroups(self.bits, size, level, self.whole_zeros)
        solutions, kept, bits, weights = {}, 0, 0.0, 0
        # One after the other: tiles must not reach from one consumer's rows into the next, and each has its threshold.
        for name, target in (context.targets or {}).items():
            solution = spqr(
                target,
                inverse,
                groups,
                threshold=self.threshold,
                largest_share=self.largest_share,
                leave_one_out=self.leave_one_out,
                kept=self._kept(context, name, target, gram),
            )
            solutions[name] = solution
            stored = solution.quantized
            if isinstance(stored, SparseTensor):
                kept += 0 if stored.outliers is None else stored.outliers.count
            bits, weights = bits + stored.bits_per_element() * target.numel(), weights + target.numel()
        context.report(outlier_share=kept / weights, stored_bits=bits / weights)
        return solutions

    def _kept(self, context: SiteContext, name: str, target: Tensor, gram: Tensor | None) -> Tensor | None:
        """Outliers (outputs, width) that are chosen beforehand; None where errors choose."""
        if self.chosen_by == "error":
            return None
        if self.chosen_by == "none":
            return torch.zeros_like(target, dtype=torch.bool)
        if self.chosen_by == "gradient":
            return self._measured(context, name, target)
        score = target.abs()
        if self.chosen_by == "random":
            score = torch.rand(target.shape, generator=context.block.generator).to(target)
        elif self.chosen_by == "hessian":
            energy = context.energy(context.scheme.values) if gram is None else torch.diagonal(gram)
            score = score * energy.sqrt().to(score)
        return strongest(score, self.share)

    def _measured(self, context: SiteContext, name: str, target: Tensor) -> Tensor:
        places = context.block.measured.get(f"{MEASURED}{context.block.name}.{name}")
        if places is None:
            raise RecipeError(
                f"{context.block.name}.{name}: chosen_by={self.chosen_by} needs a step weight_gradients in the recipe"
            )
        mask = torch.zeros(target.numel(), dtype=torch.bool, device=target.device)
        mask[places.to(target.device).long()] = True
        return mask.reshape(target.shape)
