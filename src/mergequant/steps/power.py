"""Rounding onto power grids, whose exponent is searched for the network or a linear, or learned (PowerQuant, NUPES)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mergequant.calibration import SiteContext, StorePolicy
from mergequant.errors import RecipeError
from mergequant.grids import IntegerGrid, PowerGrid, Quantizer, fitting_group
from mergequant.grids.power import LARGEST_EXPONENT, SMALLEST_EXPONENT, SQUARES
from mergequant.models import ModelShell
from mergequant.solvers import LearnedPower, Solution, exponent_losses, learn_power, search_exponent
from mergequant.solvers.power import EXPONENTS
from mergequant.steps.base import MeasuringStep
from mergequant.steps.rounding import Round
from mergequant.transforms import FloatScheme

__all__ = ["PowerRound", "SearchExponent"]

FOUND = "power_exponent"  # in `BlockContext.measured`


@dataclass(frozen=True)
class SearchExponent(MeasuringStep):
    """The exponent of least sum of ||W - What|| over all linears of the model, as PowerQuant.

    One pass over the weights with `solvers.power.EXPONENTS`, where the paper lets Nelder-Mead walk over all of them.

    Attributes:
        bits, group_size: of the rounding that follows; groups are fitted as there.
    """

    name: ClassVar[str] = "search_exponent"
    bits: int = 4
    group_size: int = 0

    def check(self, shell: ModelShell) -> None:
        pass

    def measure(
        self, shell: ModelShell, windows: Tensor, policy: StorePolicy, progress: Callable[[str], None]
    ) -> dict[str, Tensor]:
        total = torch.zeros(len(EXPONENTS), dtype=torch.float64)
        for index, structure in enumerate(shell.structures):
            progress(f"weights of block {index + 1} of {len(shell.structures)}")
            block = shell.load_block(index)
            for name in [name for site in structure.sites for name in site.consumers]:
                linear = block.get_submodule(name)
                if isinstance(linear, nn.Linear):
                    group = fitting_group(linear.weight.shape[1], self.group_size)
                    quantizer = Quantizer(IntegerGrid(self.bits), group or None)
                    total += exponent_losses(linear.weight.detach(), quantizer).cpu()
            shell.release_block(index)
        return {FOUND: torch.tensor(EXPONENTS[int(total.argmin())], dtype=torch.float64)}


@dataclass(frozen=True)
class PowerRound(Round):
    """Round onto a power grid (`grids/power.py`).

    GPTQ and coordinate descent take the nearest level, RTN the nearest code, as the papers do.

    Attributes:
        exponent: 0 = what `search_exponent` has found for the network, or without that step a search for each linear;
            1/2 serves integer inputs, whose products with squares of 4-bit codes are an int8 GEMM.
        learn: gradient steps on codes and exponent of each linear, for the error at its output (NUPES); 0 = none.
        code_rate, exponent_rate: largest steps of Adam, for codes in levels.
    """

    name: ClassVar[str] = "power_round"
    exponent: float = 0.0
    learn: int = 0
    code_rate: float = 0.05
    exponent_rate: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels != 1 or self.zeros or self.outliers:
            raise RecipeError("power_round: zero must stay zero, so there are neither zero points, levels nor outliers")
        if self.exponent and not SMALLEST_EXPONENT <= self.exponent <= LARGEST_EXPONENT:
            raise RecipeError(
                f"power_round: exponent {self.exponent} is not {SMALLEST_EXPONENT}..{LARGEST_EXPONENT}; 0 searches it"
            )
        if self.learn < 0 or min(self.code_rate, self.exponent_rate) < 0:
            raise RecipeError(f"power_round: learn {self.learn} and the rates must not be negative")

    def run(self, context: SiteContext) -> None:
        if not isinstance(context.scheme, FloatScheme) and (self.exponent != SQUARES or self.bits > 4):
            raise RecipeError(
                f"{context.name}: integer inputs need weights that are whole numbers: exponent={SQUARES} and at most 4 "
                "bits; or leave the input in floating point"
            )
        super().run(context)

    def solve_site(self, context: SiteContext, gram: Tensor | None) -> dict[str, Solution]:
        found = context.block.measured.get(FOUND)
        known = self.exponent or (0.0 if found is None else float(found))
        if self.learn and gram is None:
            gram = context.gram().total
        learned = LearnedPower(self.learn, self.code_rate, 0.0 if self.exponent else self.exponent_rate)
        solved: dict[str, Solution] = {}
        exponents = []
        for name, weight in (context.targets or {}).items():
            group = self.group_of(weight.shape[1]) or None
            own = known or search_exponent(weight, Quantizer(IntegerGrid(self.bits), group))
            start = replace(self, exponent=own).solve(weight, None if self.method == "rtn" else gram, group)
            solved[name] = start if gram is None or not self.learn else learn_power(weight, gram, start, learned)
            grid = solved[name].quantized.grid
            exponents.append(grid.exponent if isinstance(grid, PowerGrid) else 1.0)
        context.report(smallest_exponent=min(exponents), largest_exponent=max(exponents))
        return solved

    def quantizer(self, group_size: int | None) -> Quantizer:
        nearest_by: Literal["power", "value"] = "power" if self.method == "rtn" else "value"
        grid = PowerGrid(self.bits, self.exponent or 1.0, nearest_by)
        return replace(super().quantizer(group_size), grid=grid)
