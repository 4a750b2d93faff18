"""DMMV: weights rounded so that the worst token's error is small, not the mean one.

"Discrete Optimization of Min-Max Violation and its Applications Across Computational Sciences", arXiv 2508.13437, which
was available as a digest. Rows are rounded by GPTQ with a zero point per row, then searched (`solvers/dmmv.py`).

Where this differs from the released code: constraints are 2048 calibration tokens (`tokens=0` takes all, as there), and
the guard watches the squared error on all of them; the budget is 2 repairs a row (there: 10 seconds a row); of a row's
variables the 32 most promising may rise, and 32 fall, in one move (`candidates=0` tries all, as there). Outliers are
not separated (there: an option).
"""

from typing import Literal

from mergequant.recipes.recipe import Figure, PrefixChoice, register_recipe
from mergequant.steps import RoundMinMax, Step

__all__ = ["dmmv"]

EXPECTED = (
    Figure("better than existing methods, %", 14, "W3 per channel, no outliers apart, mean over models", "abstract"),
)


@register_recipe("dmmv", paper="DMMV, arXiv 2508.13437", expected=EXPECTED)
def dmmv(
    *,
    weight_bits: int = 3,
    group_size: int = 0,
    zeros: bool = True,
    clip: bool = False,
    start: Literal["gptq", "rtn"] = "gptq",
    moves: Literal["swap", "swap_and_single"] = "swap",
    guard: bool = True,
    iterations: int = 2,
    candidates: int = 32,
    tokens: int = 2048,
    activation_order: bool = True,
    damping: float = 0.01,
    prefix: str | tuple[int, ...] = "none",
) -> tuple[tuple[Step, ...], PrefixChoice]:
    """Weight-only: codes of a start are moved until the largest output error of every row is small.

    weight_bits, group_size: where the group size does not divide a width, a smaller one that does is taken, or a scale
        per row; 0 = a scale per row. zeros: a zero point for every scale; clip: search ranges of least error.
    start: gptq (activation_order, damping: its own), or rtn, which needs far more search.
    moves: swap = as the paper, two weights trade levels; swap_and_single = one alone may move, too: finds more.
    guard: the squared error on all calibration tokens may not grow; without it the mean error does.
    iterations: of destroying and repairing some codes of a row; 0 = local search alone.
    candidates: weights of a row that are tried in a move, each way; 0 = all. tokens: constraints; 0 = all tokens.
    prefix: none, bos, auto, or token ids whose keys and values start every cache.
    """
    step = RoundMinMax(
        method=start,
        bits=weight_bits,
        group_size=group_size,
        fit_groups=True,
        zeros=zeros,
        clip=clip,
        damping=damping,
        activation_order=activation_order,
        dense=True,
        tokens=tokens,
        moves=moves,
        guard=guard,
        iterations=iterations,
        candidates=candidates,
    )
    return (step,), prefix
