"""What the parts of a block are to each other: norms, sites, and what feeds a site. Data, with no weights inside."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

__all__ = ["BlockStructure", "NormKind", "NormRole", "Producer", "RowSlice", "Site", "SiteKind"]

NormKind = Literal["rms", "layer"]
SiteKind = Literal["norm", "stream", "attention_output", "mlp_output"]


@dataclass(frozen=True)
class NormRole:
    """A norm over the hidden width whose function is proven: `gain * x / rms(x)`, or LayerNorm's `gain * (...) + bias`.

    name         name relative to the block
    kind         "rms" or "layer"
    eps          what is added under the square root
    unit_offset  the gain that is applied is 1 + weight (Gemma)
    width        number of channels
    """

    name: str
    kind: NormKind
    eps: float
    unit_offset: bool
    width: int

    def gain(self, module: nn.Module) -> torch.Tensor:
        """The gain (width,) that `module` applies, as a new float32 tensor (float64 if the weights are float64)."""
        weight = _parameter(module, "weight")
        return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True).add_(float(self.unit_offset))

    def bias(self, module: nn.Module) -> torch.Tensor | None:
        """The bias (width,) that `module` adds, as a new tensor like the gain; None if it has none."""
        if getattr(module, "bias", None) is None:
            return None
        bias = _parameter(module, "bias")
        return bias.to(torch.promote_types(bias.dtype, torch.float32), copy=True)

    def set_gain(self, module: nn.Module, gain: torch.Tensor) -> None:
        """Write the weight of `module` in place so that it applies `gain` (width,)."""
        _parameter(module, "weight").copy_(gain - float(self.unit_offset))

    def set_bias(self, module: nn.Module, bias: torch.Tensor) -> None:
        """Write the bias of `module` in place; it must have one."""
        _parameter(module, "bias").copy_(bias)


@dataclass(frozen=True)
class RowSlice:
    """Rows `start` to `stop` of the weight (and bias) of a linear: all of them, or a part of a fused one."""

    linear: str
    start: int
    stop: int


@dataclass(frozen=True)
class Producer:
    """Rows that can absorb 1/s (s > 0) of a site's input. `channel[c]` is the row, counted from `rows.start`, that
    feeds input column c of the consumers; several columns share a row where query heads share a value head."""

    rows: RowSlice
    channel: tuple[int, ...]


@dataclass(frozen=True)
class Site:
    """Linears that read one tensor, and what can be rescaled in front of them.

    name       the norm's name for kind "norm", else the first consumer's; relative to the block
    kind       "norm", "stream" (input is the residual stream itself: the residual connection of a block whose norms
               come last reads it too), "attention_output" (input mixes tokens: o_proj) or "mlp_output" (down_proj, fc2)
    consumers  names of the linears, in forward order
    width      number of input channels
    norm       the norm that feeds it, for kind "norm"
    producer   linear rows proven to absorb 1/s, or None (a GELU between fc1 and fc2 allows none)
    deviation  largest relative change of the block's output, in float64, when s is moved across the site by random
               factors: through the norm, through the producer, or where nothing else can take it up by dividing what
               the consumers read
    """

    name: str
    kind: SiteKind
    consumers: tuple[str, ...]
    width: int
    norm: NormRole | None
    producer: Producer | None
    deviation: float

    @property
    def begins_module(self) -> bool:
        """Whether attention or an MLP begins here, reading what the residual stream holds by then."""
        return self.kind in ("norm", "stream")


@dataclass(frozen=True)
class BlockStructure:
    """Sites in forward order, all linears in forward order, and the linears that belong to no site.

    `causal`: no token's output depends on later tokens. An encoder's block is not causal and can keep no cache.
    """

    sites: tuple[Site, ...]
    linears: tuple[str, ...]
    unserved: tuple[str, ...]
    causal: bool = True


def _parameter(module: nn.Module, name: str) -> torch.Tensor:
    tensor = getattr(module, name)
    return tensor.detach() if isinstance(tensor, torch.Tensor) else torch.as_tensor(tensor)
