"""Fine-tuning of a whole block: static steps, and row ranges and weights, trained against the float block's output.

PrefixQuant (arXiv 2410.05265; digest, step 4) tunes them block by block with both quantizers in the loop. Here steps
may be those of a tensor or of every channel, split channels included, and the weights may be left to GPTQ.
"""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from mergequant import ops
from mergequant.calibration import BlockContext, SiteContext
from mergequant.errors import RecipeError
from mergequant.grids import ClipSearch, IntegerGrid, Quantizer
from mergequant.steps.base import BlockStep
from mergequant.steps.reconstruct import Training, fake_quantize, reconstruct
from mergequant.transforms import ChannelScheme, TensorScheme

__all__ = ["TuneBlock"]


@dataclass(frozen=True)
class TuneBlock(BlockStep):
    """Train the steps of every site, the range of every weight row, and the weights themselves.

    It stands behind the steps that make static inputs (`tensor_input`, `ranges`, `split`, `clip`). With trained
    weights, a `round` to the nearest code without a search of ranges follows, which finds the trained ones: weights are
    handed to it clipped to them. Without, the ranges only serve the loop: compensation, GPTQ and its own search follow.

    Attributes:
        weight_bits: of the rounding in the loop.
        rate: learning rate of steps and ranges, relative to where they begin.
        weight_rate: learning rate of the weights, relative to the mean size of their row; 0 = they stay as they are.
        scale_rate: learning rate of a scale per channel in front of inputs with one step for the tensor, before their
            rotation; the rows of v_proj and up_proj take it up, at no cost. 0 = none.
        epochs, chunks, batch_tokens: see `reconstruct.Training`.
    """

    name: ClassVar[str] = "tune_block"
    weight_bits: int = 4
    rate: float = 1e-3
    weight_rate: float = 1e-3
    scale_rate: float = 0.0
    epochs: int = 4
    chunks: int = 16
    batch_tokens: int = 2048

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.chunks < 1 or self.batch_tokens < 0 or self.rate <= 0:
            raise RecipeError("tune_block: epochs, chunks, batch_tokens and rate must be positive")
        if self.weight_rate < 0 or self.scale_rate < 0:
            raise RecipeError("tune_block: weight_rate and scale_rate must be positive, or 0 to train none")

    def run(self, context: BlockContext) -> None:
        block = copy.deepcopy(context.module)
        tuned: list[tuple[SiteContext, _TunedInput, dict[str, _TunedLinear]]] = []
        for site in context.structure.sites:
            own = context.site(site)
            inputs = _TunedInput(own, self.scale_rate > 0).to(context.device)
            linears = {}
            for name in site.consumers:
                linear = context.linear(name)
                linears[name] = _TunedLinear(linear, inputs, self.weight_bits, self.weight_rate > 0)
                path, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(path), leaf, linears[name])
            tuned.append((own, inputs, linears))
        rates = {"*.log_step": self.rate, "*.log_range": self.rate}
        if self.weight_rate:
            rates["*.change"] = self.weight_rate
        if any(inputs.log_scale is not None for _, inputs, _ in tuned):
            rates["*.log_scale"] = self.scale_rate
        advice = f"lower tune_block.rate (now {self.rate}), weight_rate or scale_rate"
        history = reconstruct(context, block, rates, Training(self.epochs, self.chunks, self.batch_tokens), advice)
        context.report("block", loss_first_epoch=history[0], loss_last_epoch=history[-1])
        with torch.no_grad():
            for own, inputs, linears in tuned:
                own.scheme = inputs.trained()
                if self.weight_rate:
                    own.targets = {name: inputs.finish(linear.clipped()) for name, linear in linears.items()}
                own.report(step_change=float(inputs.log_step.exp().mean()))
            for own, inputs, _ in tuned:  # targets of a producer's rows, set above, follow
                if inputs.log_scale is not None:
                    _move_scale(context, own, inputs.scale())
                own.close()  # what reads its inputs from now on reads those of the changed block


def _move_scale(context: BlockContext, own: SiteContext, scale: Tensor) -> None:
    context.scale_channels(own.site, scale)
    for name in own.site.consumers:
        weight = context.linear(name).weight.detach().float()
        own.weights[name] = ops.hadamard_transform(weight) if own.rotation else weight.clone()
    own.report(smallest_scale=float(scale.min()), largest_scale=float(scale.max()))


class _TunedInput(nn.Module):
    """The static input of a site, with trainable steps that its linears share.

    With one step for the tensor it gives codes times step, with a step per channel the codes, as its scheme does.
    """

    def __init__(self, own: SiteContext, scales: bool) -> None:
        super().__init__()
        scheme, producer = own.scheme, own.site.producer
        if not isinstance(scheme, (TensorScheme, ChannelScheme)) or own.transform is not None:
            raise RecipeError(
                f"{own.name}: tune_block trains static steps; put tensor_input or ranges for this site before it"
            )
        self.scheme, self.rotated = scheme, bool(own.rotation)
        rows = None if producer is None or own.site.norm is not None else torch.tensor(producer.channel)
        self.log_scale: nn.Parameter | None = None
        if isinstance(scheme, TensorScheme):
            steps = torch.zeros(1, dtype=torch.long)
            if scales and rows is not None:
                self.log_scale = nn.Parameter(torch.zeros(int(rows.max()) + 1))
        else:  # channels that one row feeds have one step, unless a rotation lies between
            steps = torch.arange(own.site.width) if rows is None or self.rotated else rows
        self.register_buffer("rows", torch.zeros(0, dtype=torch.long) if rows is None else rows)
        self.register_buffer("steps", steps)
        self.log_step = nn.Parameter(torch.zeros(int(steps.max()) + 1))

    def scale(self) -> Tensor:
        """Scale of every channel in front of the rotation (width,), 1 if none is trained."""
        rows = self.get_buffer("rows")
        return torch.ones((), device=rows.device) if self.log_scale is None else self.log_scale.exp()[rows]

    def change(self) -> Tensor:
        """What the first steps are multiplied by (1,) or (channels,)."""
        return self.log_step.exp()[self.get_buffer("steps")]

    def trained(self) -> TensorScheme | ChannelScheme:
        """The scheme with the trained steps."""
        if isinstance(self.scheme, TensorScheme):
            return replace(self.scheme, step=self.scheme.step * float(self.change()))
        return replace(self.scheme, step=self.scheme.step * self.change().detach())

    def fold(self, weight: Tensor) -> Tensor:
        """The weight that meets what `forward` gives (outputs, width)."""
        if self.log_scale is not None:
            weight = weight * self.scale()
        if self.rotated:
            weight = _rotated(weight)
        if isinstance(self.scheme, TensorScheme):
            return weight
        return replace(self.scheme, step=self.scheme.step * self.change()).fold(weight)

    def finish(self, weight: Tensor) -> Tensor:
        """A folded weight as the trained scheme's codes meet it."""
        return self.trained().fold(weight) if isinstance(self.scheme, TensorScheme) else weight

    def forward(self, x: Tensor) -> Tensor:
        if self.log_scale is not None:
            x = x / self.scale()
        if self.rotated:
            x = _rotated(x)
        if isinstance(self.scheme, TensorScheme):
            return fake_quantize(x, self.scheme.step * self.change(), self.scheme.bits)
        shares = 1 / self.change()[self.scheme.index]
        slots = x.index_select(-1, self.scheme.index) * (self.scheme.multiplier * shares) + self.scheme.offset
        return fake_quantize(slots, slots.new_ones(1), self.scheme.bits)


class _TunedLinear(nn.Module):
    """A linear with trainable row ranges, and weights if they are trained, behind a trainable input."""

    def __init__(self, old: nn.Linear, inputs: _TunedInput, bits: int, trains_weight: bool) -> None:
        super().__init__()
        self.inputs, self.bits, self.bias = inputs, bits, old.bias
        self.weight = old.weight.detach().float().clone()
        self.high = IntegerGrid(bits).high
        with torch.no_grad():
            first = inputs.fold(self.weight)
        scale = Quantizer(IntegerGrid(bits), None, ClipSearch()).find_scale(first)
        self.range, self.row_size = scale * self.high, first.square().mean(1, keepdim=True).sqrt()
        self.log_range = nn.Parameter(torch.zeros_like(scale))
        # One learning rate fits rows of all sizes.
        self.change = nn.Parameter(torch.zeros_like(first)) if trains_weight else None

    def bound(self) -> Tensor:
        """Largest magnitude that the grid of every row covers (outputs, 1)."""
        return self.range * self.log_range.exp()

    def clipped(self) -> Tensor:
        """The folded weight within its ranges (outputs, width)."""
        weight, bound = self.inputs.fold(self.weight), self.bound()
        if self.change is not None:
            weight = weight + self.row_size * self.change
        return torch.maximum(torch.minimum(weight, bound), -bound)

    def forward(self, x: Tensor) -> Tensor:
        weight = fake_quantize(self.clipped(), self.bound() / self.high, self.bits)
        return nn.functional.linear(self.inputs(x), weight, self.bias)


def _rotated(x: Tensor) -> Tensor:
    """As `ops.hadamard_transform`, which has no gradient."""
    turn = ops.rotation(x.shape[-1])
    left, right = turn.left.to(x), turn.right.to(x)
    return (left.t() @ (x.reshape(-1, left.shape[0], right.shape[0]) @ right)).reshape(x.shape)
