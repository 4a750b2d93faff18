"""Exponents of power grids: searched on the weights (PowerQuant), or learned together with the codes (NUPES)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.grids import PowerGrid, QTensor, Quantizer
from mergequant.grids.power import LARGEST_EXPONENT, SMALLEST_EXPONENT
from mergequant.solvers.rounding import Solution, output_error

__all__ = ["EXPONENTS", "LearnedPower", "exponent_losses", "learn_power", "search_exponent"]

EXPONENTS = tuple(round(0.30 + 0.02 * i, 2) for i in range(36))  # 0.30 .. 1.00
SMALLEST_LOG = 1e-8
CHECKS = 20  # of the rounded error on the way
BETAS, TINY = (0.9, 0.99), 1e-12


@dataclass(frozen=True)
class LearnedPower:
    """How codes and exponent are learned.

    Attributes:
        steps: gradient steps; 0 = none.
        code_rate: largest step of Adam for codes, in levels.
        exponent_rate: largest step of Adam for the exponent; 0 keeps it.
        temperature: of the soft rounding at the start and at the end.
    """

    steps: int = 300
    code_rate: float = 0.05
    exponent_rate: float = 1e-3
    temperature: tuple[float, float] = (0.3, 0.02)

    def __post_init__(self) -> None:
        if self.steps < 0 or min(self.code_rate, self.exponent_rate) < 0 or min(self.temperature) <= 0:
            raise UsageError(f"learning a power grid: steps, rates and temperatures must be positive, got {self}")


def exponent_losses(weight: Tensor, quantizer: Quantizer, exponents: Iterable[float] = EXPONENTS) -> Tensor:
    """||W - What(a)|| of a weight (outputs, width) for each exponent, float64 (exponents,); codes to the nearest."""
    weight = weight.float()
    losses = []
    for exponent in exponents:
        grid = PowerGrid(quantizer.grid.bits, exponent)
        made = replace(quantizer, grid=grid).encode(weight)
        losses.append((made.decode() - weight).double().norm())
    return torch.stack(losses)


def search_exponent(weight: Tensor, quantizer: Quantizer) -> float:
    """The exponent of least weight error, of `EXPONENTS`. The loss is locally convex (PowerQuant, theorem 1)."""
    return EXPONENTS[int(exponent_losses(weight, quantizer).argmin())]


def learn_power(weight: Tensor, gram: Tensor, start: Solution, learned: LearnedPower) -> Solution:
    """Learn codes over the whole grid, and the exponent, for the least output error tr(D S D^T).

    A code is round(m sign(w) u^a + d), u = |w| / wmax: it follows the exponent, and d, which is learned, may carry it
    over many levels (AdaRound's only choose floor or ceil). Rounding is soft and sharpens on the way; the gradient goes
    straight through its whole part. Ranges stay. The gradient of the exponent is

        (wmax / a) [ (|c|/m)^(1/a - 1) u^a ln u - (|c|/m)^(1/a) ln (|c|/m)^(1/a) ]

    with logarithms that are held away from zero. The error with whole codes is looked at on the way, and the best
    point is kept, so it never ends above its start.

    Args:
        weight: float (outputs, width).
        gram: raw sum of x x^T (width, width).
        start: a solution on a `PowerGrid`: exponent, ranges, and the codes to begin with.
        learned: steps and rates.

    Raises:
        UsageError: a start on another grid.
    """
    made = start.quantized
    grid = made.grid
    if not isinstance(grid, PowerGrid):
        raise UsageError("learning a power grid starts from codes of a power grid")
    weight, high, exponent = weight.float(), grid.high, grid.exponent
    width = weight.shape[1]
    system = (gram / torch.diagonal(gram).mean().clamp_min(1e-300)).float()
    top = made.scale.repeat_interleave(width // made.scale.shape[1], 1) * grid.reach  # wmax of every weight
    share = (weight.abs() / top).clamp(SMALLEST_LOG, 1.0)
    shift = made.codes.float() - high * share.pow(exponent).copysign(weight)
    shift = torch.where(shift.abs() <= 0.5, torch.zeros_like(shift), shift)  # codes that are nearest already
    moments = [torch.zeros_like(shift), torch.zeros_like(shift)]
    own = [torch.zeros(()), torch.zeros(())]
    best, least = made, output_error(made.decode() - weight, gram)
    for step in range(learned.steps):
        done = step / learned.steps
        first, last = learned.temperature
        latent = (high * share.pow(exponent).copysign(weight) + shift).clamp(-high, high)
        code = _soft(latent, first * (last / first) ** done)
        level = (code.abs() / high).clamp_min(SMALLEST_LOG)
        value = level.pow(1 / exponent)
        error = (top * value.copysign(code) - weight) @ system  # half the gradient of the loss
        inner = (code.abs().clamp_min(0.5) / high).pow(1 / exponent - 1)  # a code of 0 must be able to leave
        slope = top * inner / (high * exponent)
        power = share.pow(exponent)
        turn = (top / exponent) * (inner * power * share.log() - value * value.clamp_min(SMALLEST_LOG).log())
        turned = (error * torch.where(code.abs() >= 0.5, turn, torch.zeros_like(turn)).copysign(code)).sum()
        rate = 0.5 * (1 + math.cos(math.pi * done))
        shift = shift - learned.code_rate * rate * _adam(error * slope, moments, step)
        if learned.exponent_rate:
            moved = exponent - learned.exponent_rate * rate * float(_adam(turned.cpu(), own, step))
            exponent = min(max(moved, SMALLEST_EXPONENT), LARGEST_EXPONENT)
        if (step + 1) % max(learned.steps // CHECKS, 1) == 0 or step + 1 == learned.steps:
            found = _rounded(weight, share, shift, top, replace(grid, exponent=exponent), made)
            reached = output_error(found.decode() - weight, gram)
            if reached < least:
                best, least = found, reached
    return Solution(best, start.damping, start.attempts)


def _rounded(weight: Tensor, share: Tensor, shift: Tensor, top: Tensor, grid: PowerGrid, like: QTensor) -> QTensor:
    """Whole codes, with the scales that give the same ranges under the exponent of `grid`."""
    codes = (grid.high * share.pow(grid.exponent).copysign(weight) + shift).clamp(-grid.high, grid.high)
    scale = top[:, :: weight.shape[1] // like.scale.shape[1]] / grid.reach
    # Whole numbers are the codes of the grid with exponent 1.
    return QTensor(replace(grid, exponent=1.0).nearest(codes).to(torch.int8), scale.contiguous(), grid)


def _soft(latent: Tensor, temperature: float) -> Tensor:
    """floor(v) + h(v - floor(v)): a sigmoid around one half, stretched to reach 0 and 1."""
    whole = latent.floor()
    edge = 1 / (1 + math.exp(min(0.5 / temperature, 60.0)))
    soft = torch.sigmoid((latent - whole - 0.5) / temperature)
    return whole + ((soft - edge) / (1 - 2 * edge)).clamp(0, 1)


def _adam(gradient: Tensor, moments: list[Tensor], step: int) -> Tensor:
    """Adam's direction; the moments are updated in place."""
    moments[0] = BETAS[0] * moments[0] + (1 - BETAS[0]) * gradient
    moments[1] = BETAS[1] * moments[1] + (1 - BETAS[1]) * gradient.square()
    mean, spread = (moment / (1 - beta ** (step + 1)) for moment, beta in zip(moments, BETAS))
    return mean / (spread.sqrt() + TINY)
