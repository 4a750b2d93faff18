"""Groups that run down a column: `size` neighbouring outputs of one input channel share a scale (AdaDim's per-IC form).

"Rethinking Channel Dimensions to Isolate Outliers for Low-bit Weight Quantization of Large Language Models", arXiv
2309.15531. A column that meets large inputs keeps its rounding to itself, where a group along a row would share it. The
scale changes along the sum, so such weights are for float inputs, and decoded before the product. There are as many
groups as along rows, so they take as many bits.
"""

from dataclasses import dataclass

from torch import Tensor

from mergequant.grids.quantizer import QTensor, Quantizer, decode

__all__ = ["AcrossTensor", "decode_across", "encode_across"]


@dataclass(frozen=True)
class AcrossTensor(QTensor):
    """Codes int8 (rows, width), scales float32 (rows / size, width), and zero points int8 of that shape, or None."""

    zero: Tensor | None = None

    @property
    def size(self) -> int:
        """Rows that share a scale."""
        return self.codes.shape[0] // self.scale.shape[0]

    def decode(self) -> Tensor:
        return decode_across(self.codes.to(self.scale.dtype), self.scale, self.zero)

    def rows(self, start: int, stop: int) -> "AcrossTensor":
        """Rows start..stop, of whole groups."""
        own = slice(start // self.size, stop // self.size)
        zero = None if self.zero is None else self.zero[own]
        return AcrossTensor(self.codes[start:stop], self.scale[own], self.grid, zero)

    def bits_per_element(self) -> float:
        zeros = 0 if self.zero is None else 8 * self.zero.numel()
        return super().bits_per_element() + zeros / self.codes.numel()


def encode_across(values: Tensor, quantizer: Quantizer) -> AcrossTensor:
    """Quantize a matrix (rows, width) in groups of `quantizer.group_size` rows; None = the whole column.

    Raises:
        UsageError: the group size does not divide the rows.
    """
    made = quantizer.encode(values.t().contiguous())
    zero: Tensor | None = getattr(made, "zero", None)
    turned = None if zero is None else zero.t().contiguous()
    return AcrossTensor(made.codes.t().contiguous(), made.scale.t().contiguous(), made.grid, turned)


def decode_across(codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    """Float values of float codes (rows, width) with scales, and zero points if there are any (rows / size, width)."""
    return decode(codes.t(), scale.t(), None if zero is None else zero.t()).t().contiguous()
