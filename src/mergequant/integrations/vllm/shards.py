"""Which rows and columns of a quantized layer one GPU of a tensor-parallel group holds, as plain index arithmetic.

q, k, v, gate and up are cut by rows; o and down by columns, each GPU with the channels that its own rows of v or up
gave. A gather index goes with the channels it reads. What mixes all channels (an online rotation, a Kronecker product,
merged channels) cannot be done on a share: such an input is gathered first, every GPU makes the codes of whole tokens
and multiplies its share of them. Sums of integers are exact, so the shares of a static or gathered layer add up to the
whole. A scale per token that is found on a share covers that share alone: a finer grid than the whole layer's, so codes
differ from those of one GPU.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergequant.errors import CheckpointError
from mergequant.nn import InputQuantizer, InputSpec

__all__ = ["ColumnShare", "Share", "column_share", "mixes_channels", "rows_of"]

CODE_MULTIPLE = 32  # columns of a share, where it may be chosen: what kernels read without padding


@dataclass(frozen=True)
class Share:
    """GPU `rank` of the `size` that hold a model together."""

    rank: int = 0
    size: int = 1


def rows_of(name: str, outputs: int, local: int, share: Share) -> int:
    """First of the `local` rows that a GPU holds of `outputs`. Key and value heads may lie on several GPUs.

    Raises:
        CheckpointError: rows that do not fill the GPUs evenly.
    """
    copies, rest = divmod(local * share.size, outputs)
    if rest or copies < 1 or share.size % copies:
        raise CheckpointError(
            f"{name}: {outputs} outputs cannot be held {local} at a time by {share.size} GPUs; choose a "
            "--tensor-parallel-size that divides the model's heads and its intermediate size"
        )
    return share.rank // copies * local


def mixes_channels(spec: InputSpec) -> bool:
    """Whether a code of this input depends on channels all over it."""
    return bool(spec.rotation or spec.left or (spec.kind == "dynamic" and spec.gathers))


@dataclass(frozen=True, eq=False)
class ColumnShare:
    """The columns of o or down that a GPU holds.

    Attributes:
        columns: int64, places in the whole layer's codes.
        start, channels: range of arriving channels that lie on this GPU.
        padding: columns of zeros behind them.
        whole: the input is gathered from all GPUs before it becomes codes.
    """

    columns: Tensor
    start: int
    channels: int
    padding: int
    whole: bool

    def take(self, weight: Tensor) -> Tensor:
        """Own columns of a weight (outputs, width), zeros behind: (outputs, columns + padding)."""
        own = weight.index_select(1, self.columns.to(weight.device))
        return torch.nn.functional.pad(own, (0, self.padding))

    def quantizer(self, module: InputQuantizer) -> InputQuantizer:
        """What makes this GPU's codes: the whole layer's quantizer, or one of the own channels."""
        spec = module.spec
        if self.whole or self.channels == spec.in_width:
            return module
        width = self.columns.numel() + self.padding
        own = InputQuantizer(replace(spec, in_width=self.channels, width=width))
        for name in ("multiplier", "shift"):
            vector = getattr(module, name)
            if vector is None or vector.numel() == 1:
                setattr(own, name, vector)
            elif spec.kind == "static":
                setattr(own, name, self._columns_of(vector))
            else:
                setattr(own, name, vector[self.start : self.start + self.channels].clone())
        if module.index is not None:
            places = module.index.index_select(0, self.columns.to(module.index.device)) - self.start
            own.index = torch.nn.functional.pad(places, (0, self.padding))
        return own

    def _columns_of(self, vector: Tensor) -> Tensor:
        own = vector.index_select(0, self.columns.to(vector.device))
        return torch.nn.functional.pad(own, (0, self.padding))


def column_share(name: str, spec: InputSpec, index: Tensor | None, share: Share) -> ColumnShare:
    """Columns of a layer that is cut along its input.

    Args:
        name: of the layer, for errors.
        spec: of the whole layer's input.
        index: its gather index, if it has one.
        share: the GPU.

    Raises:
        CheckpointError: channels that do not fill the GPUs evenly.
    """
    if spec.in_width % share.size:
        raise CheckpointError(
            f"{name}: {spec.in_width} input channels cannot be cut for {share.size} GPUs; choose a "
            "--tensor-parallel-size that divides the model's heads and its intermediate size"
        )
    channels = spec.in_width // share.size
    start = share.rank * channels
    if share.size == 1:
        return ColumnShare(torch.arange(spec.width), 0, channels, 0, False)
    if mixes_channels(spec):
        return ColumnShare(_even_share(name, spec.width, share), start, channels, 0, True)
    if index is None:
        return ColumnShare(torch.arange(start, start + channels), start, channels, 0, False)
    places = index.cpu()
    columns = torch.nonzero((places >= start) & (places < start + channels)).flatten()
    count = columns.numel()
    return ColumnShare(
        columns, start, channels, max(CODE_MULTIPLE, -(-count // CODE_MULTIPLE) * CODE_MULTIPLE) - count, False
    )


def _even_share(name: str, width: int, share: Share) -> Tensor:
    """Consecutive columns of a width that may be cut anywhere; narrow ones are cut where kernels have to pad."""
    for multiple in (CODE_MULTIPLE, 1):
        each = -(-width // (share.size * multiple)) * multiple
        if (share.size - 1) * each < width:
            return torch.arange(share.rank * each, min(width, (share.rank + 1) * each))
    raise CheckpointError(f"{name}: {width} codes cannot be cut for {share.size} GPUs; use fewer")
