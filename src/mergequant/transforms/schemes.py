"""Input schemes: how the input of a site becomes what the integer GEMM multiplies, and what that makes of the weights.

Every scheme keeps one identity, exact where nothing is rounded:

    values(x) @ fold(W)^T == x @ W^T

`values` is what the GEMM sees: the codes themselves where the scale is static (the step has migrated into the weights),
codes times token scale where it is dynamic.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant import ops
from mergequant.grids import IntegerGrid

__all__ = ["ChannelScheme", "FloatScheme", "InputScheme", "ReassembledScheme", "TensorScheme", "TokenScheme"]


@dataclass(frozen=True)
class FloatScheme:
    """Weight-only: the input stays as it is."""

    def values(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def exact_values(self, x: Tensor) -> Tensor:
        """x itself."""
        return x

    def fold(self, weight: Tensor) -> Tensor:
        """The weight itself."""
        return weight

    def clamped(self, x: Tensor) -> float:
        """Nothing is ever clamped."""
        return 0.0


@dataclass(frozen=True)
class TokenScheme:
    """A scale per token, clip_ratio * absmax / high, found at run time."""

    bits: int
    clip_ratio: float = 1.0

    def values(self, x: Tensor) -> Tensor:
        """Codes times token scale (tokens, channels)."""
        codes, scale = ops.dynamic_quant(x, self.clip_ratio, self.bits)
        return codes.float() * scale

    def exact_values(self, x: Tensor) -> Tensor:
        """x itself: a token scale cancels without rounding."""
        return x

    def fold(self, weight: Tensor) -> Tensor:
        """The weight itself: the token scale is applied after the GEMM."""
        return weight

    def clamped(self, x: Tensor) -> float:
        """Share of codes beyond the grid."""
        grid = IntegerGrid(self.bits)
        scale = x.abs().amax(-1, keepdim=True) * (self.clip_ratio / grid.high)
        return grid.share_outside(x / scale.clamp_min(1e-12))


@dataclass(frozen=True)
class TensorScheme:
    """One static step for the tensor; it migrates into all weights."""

    bits: int
    step: float

    def values(self, x: Tensor) -> Tensor:
        """Codes (tokens, channels), as float, by the arithmetic of the run time: times 1 / step in float32."""
        multiplier = torch.tensor([1 / self.step], dtype=torch.float32, device=x.device)
        return ops.quantize_scaled(x.float(), multiplier, None, None, self.bits).float()

    def exact_values(self, x: Tensor) -> Tensor:
        """Codes before rounding."""
        return x / self.step

    def fold(self, weight: Tensor) -> Tensor:
        """Weight times step."""
        return weight * self.step

    def clamped(self, x: Tensor) -> float:
        """Share of codes beyond the grid."""
        return IntegerGrid(self.bits).share_outside(x / self.step)


@dataclass(frozen=True)
class ChannelScheme:
    """A static step per channel, with channels split, padded or dropped (MergeQuant: QSM and reconstruction).

    Slot j holds round(x[index_j] / step[index_j] + offset_j), and the weight column index_j times step times share_j.

    Attributes:
        bits: width of the clamp.
        step: float32 (channels,); 0 marks a dead channel, whose codes and weights are 0.
        index: int64 (width,), channel of each slot.
        share: float32 (width,), part of the channel's weight that the slot carries; the shares of a channel sum to 1.
        offset: float32 (width,), added before rounding; the offsets of a channel average to 0.
    """

    bits: int
    step: Tensor
    index: Tensor
    share: Tensor
    offset: Tensor

    @classmethod
    def plain(cls, step: Tensor, bits: int) -> "ChannelScheme":
        """One slot per channel."""
        ones = torch.ones_like(step)
        return cls(bits, step, torch.arange(step.shape[0], device=step.device), ones, torch.zeros_like(step))

    @property
    def width(self) -> int:
        """Number of slots."""
        return self.index.shape[0]

    @property
    def multiplier(self) -> Tensor:
        """1 / step of every slot, 0 for dead channels; in the steps' dtype."""
        step = self.step[self.index]
        return torch.where(step > 0, 1 / step, torch.zeros_like(step))

    @property
    def is_plain(self) -> bool:
        """Whether slots are just the channels in order."""
        width = self.step.shape[0]
        return self.width == width and bool((self.index == torch.arange(width, device=self.index.device)).all())

    def keep(self, slots: Tensor) -> "ChannelScheme":
        """Only some slots (bool mask or positions)."""
        return ChannelScheme(self.bits, self.step, self.index[slots], self.share[slots], self.offset[slots])

    def exact_values(self, x: Tensor) -> Tensor:
        """Codes before rounding and offset: x[index] / step."""
        return x.index_select(-1, self.index) * self.multiplier.to(x.dtype)

    def values(self, x: Tensor) -> Tensor:
        """Codes (tokens, width), as float: the very reference that the run time is compared with."""
        shift = self.offset if bool(self.offset.any()) else None
        return ops.quantize_scaled(x.float(), self.multiplier, self.index, shift, self.bits).float()

    def fold(self, weight: Tensor) -> Tensor:
        """Weight columns times step times share (outputs, width)."""
        return weight.index_select(1, self.index) * (self.step[self.index] * self.share).to(weight.dtype)

    def clamped(self, x: Tensor) -> float:
        """Share of codes beyond the grid."""
        return IntegerGrid(self.bits).share_outside(self.exact_values(x) + self.offset)


@dataclass(frozen=True)
class ReassembledScheme:
    """A scale per token, on slots that hold copies of a channel or the sum of several (QLLM; `ops.reassemble`).

    The identity holds for copies. A sum of n channels meets the mean of their columns, which is as much as it can: the
    error is (x_i - x_j)(W_i - W_j) / 2 for two.

    Attributes:
        bits: width of the clamp.
        index: int64 (width + sum(merges),), channel of each slot, then those that are added.
        share: float64 (width,), 1 / number of copies, or 1 / number of channels that the slot adds up.
        merges: see `ops.reassemble`.
    """

    bits: int
    index: Tensor
    share: Tensor
    merges: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """Number of slots."""
        return self.share.shape[0]

    def values(self, x: Tensor) -> Tensor:
        """Codes times token scale (tokens, width)."""
        return TokenScheme(self.bits).values(self.exact_values(x))

    def exact_values(self, x: Tensor) -> Tensor:
        """Slots before rounding (tokens, width)."""
        return ops.reassemble(x, self.index, self.merges)

    def fold(self, weight: Tensor) -> Tensor:
        """Columns of the slots: a share of the channel's, or the mean of those of its channels (outputs, width)."""
        return ops.reassemble(weight, self.index, self.merges) * self.share.to(weight.dtype)

    def clamped(self, x: Tensor) -> float:
        """Share of codes beyond the grid."""
        return TokenScheme(self.bits).clamped(self.exact_values(x))


InputScheme = FloatScheme | TokenScheme | TensorScheme | ChannelScheme | ReassembledScheme
