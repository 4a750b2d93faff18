"""Fine-tuning of a whole block: static steps, row ranges and weights, trained against the float block's output.

PrefixQuant (arXiv 2410.05265; digest, step 4) tunes them block by block with both quantizers in the loop.
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mergequant import ops
from mergequant.calibration import BlockContext, SiteContext
from mergequant.errors import RecipeError
from mergequant.grids import ClipSearch, IntegerGrid, Quantizer
from mergequant.steps.base import BlockStep
from mergequant.steps.reconstruct import Training, fake_quantize, reconstruct
from mergequant.transforms import TensorScheme

__all__ = ["TuneBlock"]


@dataclass(frozen=True)
class TuneBlock(BlockStep):
    """Train the step of every site, the range of every weight row, and the weights themselves.

    It stands between `tensor_input`, where steps begin, and a `round` to the nearest code without a search of ranges,
    which finds the trained ones: weights are handed to it clipped to them.

    Attributes:
        weight_bits: of the rounding in the loop.
        rate: learning rate of steps and ranges, relative to where they begin.
        weight_rate: learning rate of the weights, relative to the mean size of their row.
        epochs, chunks, batch_tokens: see `reconstruct.Training`.
    """

    name: ClassVar[str] = "tune_block"
    weight_bits: int = 4
    rate: float = 1e-3
    weight_rate: float = 1e-3
    epochs: int = 4
    chunks: int = 16
    batch_tokens: int = 2048

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.chunks < 1 or self.batch_tokens < 0 or self.rate <= 0 or self.weight_rate <= 0:
            raise RecipeError("tune_block: epochs, chunks, batch_tokens and the learning rates must be positive")

    def run(self, context: BlockContext) -> None:
        block = copy.deepcopy(context.module)
        tuned: list[tuple[SiteContext, _TunedInput, dict[str, _TunedLinear]]] = []
        for site in context.structure.sites:
            own = context.site(site)
            inputs = _TunedInput(own).to(context.device)
            linears = {}
            for name in site.consumers:
                linears[name] = _TunedLinear(own.weights[name], context.linear(name).bias, inputs, self.weight_bits)
                path, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(path), leaf, linears[name])
            tuned.append((own, inputs, linears))
        rates = {"*.log_step": self.rate, "*.log_range": self.rate, "*.change": self.weight_rate}
        advice = f"lower tune_block.rate (now {self.rate}) or tune_block.weight_rate (now {self.weight_rate})"
        history = reconstruct(context, block, rates, Training(self.epochs, self.chunks, self.batch_tokens), advice)
        context.report("block", loss_first_epoch=history[0], loss_last_epoch=history[-1])
        with torch.no_grad():
            for own, inputs, linears in tuned:
                own.scheme = TensorScheme(inputs.bits, float(inputs.step()))
                own.targets = {name: own.scheme.fold(linear.clipped()) for name, linear in linears.items()}
                own.report(step_change=float(inputs.log_step.exp()))


class _TunedInput(nn.Module):
    """The static input of a site, with a trainable step that its linears share."""

    def __init__(self, own: SiteContext) -> None:
        super().__init__()
        if not isinstance(own.scheme, TensorScheme) or own.transform is not None:
            raise RecipeError(f"{own.name}: tune_block trains static steps; put tensor_input for this site before it")
        self.bits, self.first, self.rotated = own.scheme.bits, own.scheme.step, bool(own.rotation)
        self.log_step = nn.Parameter(torch.zeros(1))

    def step(self) -> Tensor:
        """The step (1,)."""
        return self.first * self.log_step.exp()

    def forward(self, x: Tensor) -> Tensor:
        if self.rotated:  # the op has no gradient
            turn = ops.rotation(x.shape[-1])
            left, right = turn.left.to(x), turn.right.to(x)
            x = (left.t() @ (x.reshape(-1, left.shape[0], right.shape[0]) @ right)).reshape(x.shape)
        return fake_quantize(x, self.step(), self.bits)


class _TunedLinear(nn.Module):
    """A linear with trainable weight and row ranges behind a trainable input."""

    def __init__(self, weight: Tensor, bias: Tensor | None, inputs: _TunedInput, bits: int) -> None:
        super().__init__()
        self.inputs, self.bits, self.weight, self.bias = inputs, bits, weight.clone(), bias
        self.high = IntegerGrid(bits).high
        scale = Quantizer(IntegerGrid(bits), None, ClipSearch()).find_scale(weight)
        self.range, self.row_size = scale * self.high, weight.square().mean(1, keepdim=True).sqrt()
        self.log_range = nn.Parameter(torch.zeros_like(scale))
        self.change = nn.Parameter(torch.zeros_like(weight))  # one learning rate fits rows of all sizes

    def bound(self) -> Tensor:
        """Largest magnitude that the grid of every row covers (outputs, 1)."""
        return self.range * self.log_range.exp()

    def clipped(self) -> Tensor:
        """The weight within its ranges (outputs, width)."""
        bound = self.bound()
        return torch.maximum(torch.minimum(self.weight + self.row_size * self.change, bound), -bound)

    def forward(self, x: Tensor) -> Tensor:
        weight = fake_quantize(self.clipped(), self.bound() / self.high, self.bits)
        return nn.functional.linear(self.inputs(x), weight, self.bias)
