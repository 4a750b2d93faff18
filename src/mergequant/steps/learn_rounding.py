"""Learned rounding: which way every weight is rounded, and the range of its group, by the sign of the gradient.

"Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs" (SignRound, AutoRound), arXiv
2309.05516, sections 3.2 and 3.3: W ~ scale * (clip(round(W / scale + zero + V)) - zero) with V in [-1/2, 1/2], and a
range between alpha * max(W) and beta * min(W), alpha and beta in [0, 1].
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mergequant.calibration import BlockContext, SiteContext
from mergequant.errors import RecipeError
from mergequant.grids import IntegerGrid, QTensor, Quantizer, ZeroTensor
from mergequant.grids.quantizer import SMALLEST_RANGE
from mergequant.solvers import Solution
from mergequant.steps.base import BlockStep
from mergequant.steps.judge import RoundingName
from mergequant.steps.reconstruct import Training, fake_quantize, reconstruct
from mergequant.steps.rounding import Round
from mergequant.transforms import FloatScheme

__all__ = ["LearnRounding", "RoundLearned"]

LARGEST_OFFSET = 0.5
SMALLEST_SHARE = 1e-3  # of a range that training may leave over


@dataclass(frozen=True)
class RoundLearned(Round):
    """Puts in place what `learn_rounding` has found for a site; bits, groups and zeros are the same as there."""

    name: ClassVar[str] = "round_learned"
    method: RoundingName = "rtn"
    clip: bool = False

    def solve_site(self, context: SiteContext, gram: Tensor | None) -> dict[str, Solution]:
        if not context.solutions:
            raise RecipeError(f"{context.name}: nothing is learned yet; put learn_rounding before round_learned")
        return {name: found for name, found in context.solutions.items() if isinstance(found, Solution)}


@dataclass(frozen=True)
class LearnRounding(BlockStep):
    """Train rounding offsets and ranges of a block's weights until its output is that of the float block again.

    Inputs stay in floating point. `round_learned` puts the codes in place.

    Attributes:
        bits, group_size, zeros: as in `round`; a smaller group where `group_size` does not divide a width.
        epochs, chunks, batch_tokens: see `reconstruct.Training`.
        rate: learning rate times the number of steps: it falls to zero in a line, so that with 1 an offset can just
            reach the next code.
        range_rate: the same for alpha and beta; 0 = ranges are left alone.
    """

    name: ClassVar[str] = "learn_rounding"
    bits: int = 4
    group_size: int = 128
    zeros: bool = True
    epochs: int = 6
    chunks: int = 4
    batch_tokens: int = 512
    rate: float = 1.0
    range_rate: float = 1.0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.chunks < 1 or self.batch_tokens < 0 or self.rate <= 0 or self.range_rate < 0:
            raise RecipeError("learn_rounding: epochs, chunks and the learning rates must be positive")

    def run(self, context: BlockContext) -> None:
        rounding = RoundLearned(bits=self.bits, group_size=self.group_size, fit_groups=True)
        block = copy.deepcopy(context.module)
        learned: list[tuple[SiteContext, dict[str, _LearnedLinear]]] = []
        for site in context.structure.sites:
            own = context.site(site)
            if not isinstance(own.scheme, FloatScheme) or own.targets is not None or own.transform is not None:
                raise RecipeError(f"{own.name}: learn_rounding serves weight-only quantization; leave out input steps")
            quantizer = Quantizer(IntegerGrid(self.bits), rounding.group_of(site.width) or None, zeros=self.zeros)
            linears = {}
            for name in site.consumers:
                linears[name] = _LearnedLinear(context.linear(name), quantizer)
                path, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(path), leaf, linears[name])
            learned.append((own, linears))
        rates = {"*.offset": self.rate}
        if self.range_rate:
            rates["*.shares"] = self.range_rate
        training = Training(self.epochs, self.chunks, self.batch_tokens, sign=True)
        advice = f"lower learn_rounding.range_rate (now {self.range_rate})"
        history = reconstruct(context, block, rates, training, advice)
        context.report("block", loss_first_epoch=history[0], loss_last_epoch=history[-1])
        with torch.no_grad():
            for own, linears in learned:
                own.solutions = {name: Solution(linear.quantized()) for name, linear in linears.items()}
                moved = [float(linear.moved().float().mean()) for linear in linears.values()]
                own.report(moved=sum(moved) / len(moved))


class _LearnedLinear(nn.Module):
    """A linear whose weight is rounded in the loop; `offset` is V, `shares` are alpha and beta."""

    def __init__(self, old: nn.Linear, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer, self.bias = quantizer, old.bias
        weight = old.weight.detach().float()
        self.weight = weight.reshape(weight.shape[0], quantizer.groups(weight.shape[1]), -1)
        self.offset = nn.Parameter(torch.zeros_like(self.weight))
        self.shares = nn.Parameter(torch.ones(2, *self.weight.shape[:2], 1, device=weight.device))

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scales and zero points (outputs, groups, 1); without zeros alpha shortens the range on both sides."""
        grid = self.quantizer.grid
        high, low = _within(self.shares, SMALLEST_SHARE, 1.0)
        if not self.quantizer.zeros:
            scale = self.weight.abs().amax(-1, keepdim=True) * high / grid.high
            return torch.where(scale > SMALLEST_RANGE, scale, 1.0), torch.zeros_like(scale)
        low = low * self.weight.amin(-1, keepdim=True).clamp_max(0)
        scale = (high * self.weight.amax(-1, keepdim=True).clamp_min(0) - low) / (grid.high - grid.low)
        scale = torch.where(scale > SMALLEST_RANGE, scale, 1.0)
        zero = grid.low - low / scale
        return scale, zero + (grid.nearest(zero) - zero).detach()

    def forward(self, x: Tensor) -> Tensor:
        scale, zero = self.grid()
        offset = _within(self.offset, -LARGEST_OFFSET, LARGEST_OFFSET) + zero
        weight = fake_quantize(self.weight + scale * offset, scale, self.quantizer.grid.bits) - scale * zero
        return nn.functional.linear(x, weight.flatten(1), self.bias)

    def codes(self, offset: Tensor) -> Tensor:
        """Codes with an offset, floats (outputs, groups, size)."""
        scale, zero = self.grid()
        # As `fake_quantize` sees them, to the last bit.
        return self.quantizer.grid.nearest((self.weight + scale * (offset + zero)) / scale)

    def quantized(self) -> QTensor:
        """What was learned."""
        scale, zero = self.grid()
        codes = self.codes(_within(self.offset, -LARGEST_OFFSET, LARGEST_OFFSET)).flatten(1).to(torch.int8)
        if not self.quantizer.zeros:
            return QTensor(codes, scale[..., 0], self.quantizer.grid)
        return ZeroTensor(codes, scale[..., 0], self.quantizer.grid, zero[..., 0].round().to(torch.int8))

    def moved(self) -> Tensor:
        """Which weights are not rounded to the nearest code of their trained range."""
        return self.codes(self.offset) != self.codes(torch.zeros_like(self.offset))


def _within(value: Tensor, low: float, high: float) -> Tensor:
    """The value within its bounds, with the gradient of one that has none, so that it can come back."""
    return value + (value.clamp(low, high) - value).detach()
