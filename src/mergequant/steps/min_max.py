"""Rounding for the worst token: codes move until the largest output error of every row is small (DMMV)."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mergequant.calibration import SiteContext
from mergequant.errors import RecipeError
from mergequant.grids import QTensor
from mergequant.solvers import MinMaxProblem, MinMaxSearch, Solution, min_max_search
from mergequant.solvers.dmmv import MoveName
from mergequant.steps.rounding import Round

__all__ = ["RoundMinMax"]

ELEMENTS = 1 << 24  # of a tensor of levels or of errors: rows are searched in parts


@dataclass(frozen=True)
class RoundMinMax(Round):
    """As `round`, then a search over codes for the least worst error at the output (arXiv 2508.13437).

    Every output row is a discrete min-max violation problem of its own: A holds calibration tokens as the GEMM sees
    them, b what the unrounded weights make of them, the levels are the values of the row's grids. The guard watches the
    squared error on all calibration tokens.

    Attributes:
        tokens: constraints, evenly spread calibration tokens; 0 = all of them, as in the paper.
        moves, guard, iterations, candidates, checks: see `MinMaxSearch`.
    """

    name: ClassVar[str] = "round_min_max"
    tokens: int = 2048
    moves: MoveName = "swap"
    guard: bool = True
    iterations: int = 2
    candidates: int = 32
    checks: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels != 1:
            raise RecipeError("round_min_max: levels of a row do not lie apart with two levels; use levels=1")
        if self.tokens < 0:
            raise RecipeError(f"round_min_max: tokens {self.tokens} is a number of tokens; 0 = all of them")

    def solve_site(self, context: SiteContext, gram: Tensor | None) -> dict[str, Solution]:
        started = super().solve_site(context, gram)
        sample = context.sample("calibration", self.tokens) if self.tokens else torch.cat(list(context.chunks()))
        tokens = context.scheme.values(sample).float()
        solved: dict[str, Solution] = {}
        before = after = rows = 0.0
        for name, solution in started.items():
            target = (context.targets or {})[name].float()
            parts = []
            for start in range(0, len(target), self._at_once(tokens, solution)):
                own = slice(start, start + self._at_once(tokens, solution))
                made, errors = self._search(target[own], tokens, solution.quantized.rows(start, own.stop), gram)
                parts.append(made)
                before, after, rows = before + errors[0], after + errors[1], rows + len(made)
            codes = torch.cat(parts)
            solved[name] = replace(solution, quantized=replace(solution.quantized, codes=codes))
        context.report(worst_error_start=before / rows, worst_error=after / rows)
        return solved

    def _at_once(self, tokens: Tensor, solution: Solution) -> int:
        levels = solution.quantized.grid.high - solution.quantized.grid.low + 1
        return max(ELEMENTS // max(tokens.shape[0], tokens.shape[1] * levels), 1)

    def _search(
        self, target: Tensor, tokens: Tensor, start: QTensor, gram: Tensor | None
    ) -> tuple[Tensor, tuple[float, float]]:
        """Codes of some rows, and the sums of their worst errors before and after, each relative to the largest output
        of its row."""
        grid = start.grid
        every = [torch.full_like(start.codes, code) for code in range(grid.low, grid.high + 1)]
        levels = torch.stack([replace(start, codes=codes).decode() for codes in every], -1)
        cross = None if gram is None else (target.double() @ gram.double()).float()
        problem = MinMaxProblem(tokens, target @ tokens.t(), levels, None if gram is None else gram.float(), cross)
        codes = start.codes.long() - grid.low
        search = MinMaxSearch(self.moves, self.guard, self.iterations, candidates=self.candidates, checks=self.checks)
        found = min_max_search(problem, codes, search)
        size = problem.target.abs().amax(1).clamp_min(1e-30)
        errors = float((problem.violation(codes).abs().amax(1) / size).sum()), float((found.worst / size).sum())
        return (found.codes + grid.low).to(torch.int8), errors
