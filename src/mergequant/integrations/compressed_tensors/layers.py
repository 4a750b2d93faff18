"""One layer of ours as compressed-tensors stores it: the same integers, or a refusal that says why.

What can be expressed is a linear layer with int8 weights, one scale per row, whose input is quantized with one static
step or one scale per token, and a weight-only one with 4 or 8 bits and a scale per row or group. Behind our norms the
step is 1, since norm and weights have taken it up. Copies of a channel that round alike are one channel whose weight is
the sum of theirs: columns are summed as integers, which int8 holds where the codes had 4 bits.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergequant.grids import container_bits
from mergequant.nn import InputSpec, LinearSpec, NormSpec, QuantLinear

__all__ = ["Inexpressible", "Scheme", "convert_linear", "convert_norm", "pack_words"]

INT8 = torch.iinfo(torch.int8)
WORD_BITS = 32
WEIGHT_FIELDS = {"outputs", "input", "weight_bits", "group_size", "bias", "levels", "zeros", "dense"}
INPUT_FIELDS = {
    *("kind", "in_width", "width", "bits", "rotation", "per_channel", "gathers", "shifts", "clip_ratio"),
    *("left", "right", "merges"),
}


class Inexpressible(Exception):  # noqa: N818 - a finding, collected over all layers before an error is raised
    """A layer that the target format has no words for; the text is the reason."""


@dataclass(frozen=True, order=True)
class Scheme:
    """What the target format says of a linear layer.

    Attributes:
        inputs: "tensor" (a static step), "token" (dynamic) or "float" (weight-only).
        weight_bits: 8, or 4 for weight-only layers.
        group_size: columns that share a scale; 0 = rows.
        zeros: every scale has an integer zero point.
    """

    inputs: Literal["tensor", "token", "float"]
    weight_bits: int = 8
    group_size: int = 0
    zeros: bool = False


def convert_norm(spec: NormSpec, tensors: dict[str, Tensor], has_bias: bool) -> tuple[Tensor, Tensor | None]:
    """Gain and bias (channels,) in float32 of a norm without gather index, whose codes have a step of 1.

    Args:
        spec, tensors: the layer; tensors by their names inside it.
        has_bias: the architecture's norm has a bias.

    Raises:
        Inexpressible: copies of a channel that round differently, or a bias that the architecture does not have.
    """
    multiplier, index, shift = tensors["multiplier"], tensors.get("index"), tensors.get("shift")
    gain, bias = multiplier, shift
    if index is not None:
        place = index.long()
        gain = multiplier.new_zeros(spec.channels)
        gain[place] = multiplier
        alike = torch.equal(gain[place], multiplier)
        if shift is not None:
            bias = shift.new_zeros(spec.channels)
            bias[place] = shift
            alike = alike and torch.equal(bias[place], shift)
        if not alike:
            raise Inexpressible("copies of a channel round at different phases (staggered splitting)")
    if bias is not None and not has_bias:
        if bool(bias.any()):
            raise Inexpressible("the norm adds a bias that this architecture's norm does not have")
        bias = None
    if has_bias and bias is None:
        bias = torch.zeros_like(gain)
    return gain, bias


def convert_linear(
    spec: LinearSpec,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    channels: int,
    index: Tensor | None,
    has_bias: bool,
) -> tuple[Scheme, dict[str, Tensor]]:
    """Scheme and stored tensors of a linear layer, by their names inside it.

    Args:
        spec, tensors: the layer.
        dtype: of biases and of weight-only scales, in which engines keep them.
        channels: inputs of the architecture's layer.
        index: gather index of the norm that emits the layer's codes, None without one.
        has_bias: the architecture's layer has a bias.

    Raises:
        Inexpressible: an input or a bias that the format has no words for.
    """
    _require_known(spec)
    layer = QuantLinear(spec)
    layer.load_state_dict(tensors)
    stored: dict[str, Tensor] = {}
    if spec.bias and not has_bias and bool(layer.bias is not None and layer.bias.any()):
        raise Inexpressible("a bias that this architecture's layer does not have")
    if has_bias:
        bias = torch.zeros(spec.outputs) if layer.bias is None else layer.bias
        stored["bias"] = bias.to(dtype)
    if spec.input.kind == "float":
        scheme, own = _weight_only(layer, dtype)
        return scheme, {**own, **stored}
    scheme = Scheme("token" if spec.input.kind == "dynamic" else "tensor")
    scale = layer.weight_scale[:, None].clone()
    if spec.input.kind == "codes":
        stored["input_scale"] = torch.ones(1)
    elif spec.input.kind == "static":
        multiplier = _one_multiplier(tensors, spec.input)
        stored["input_scale"] = 1 / multiplier
        scale = scale * multiplier  # the engine multiplies by the step, which our scale of the row has inside
        index = tensors.get("input_quantizer.index")
    else:
        index = _dynamic_index(tensors, spec.input)
    weight = layer.integer_weight()
    if index is not None:
        weight = _sum_copies(weight, index, channels)
    return scheme, {"weight": weight, "weight_scale": scale, **stored}


def _require_known(spec: LinearSpec) -> None:
    """Refuse what later releases may add to a description, too: what is not known here would be left out."""
    for own, known in ((spec, WEIGHT_FIELDS), (spec.input, INPUT_FIELDS)):
        for part in dataclasses.fields(own):
            if part.name not in known and getattr(own, part.name) != part.default:
                raise Inexpressible(f"`{part.name}` of a layer's description ({type(own).__name__})")


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, width) in 32-bit words (rows, ceil(width * bits / 32)), first code in the lowest bits.

    Codes are stored with an offset of half the range, as unsigned numbers.
    """
    per_word = WORD_BITS // bits
    wide = codes.to(torch.int64) + (1 << (bits - 1))
    wide = torch.nn.functional.pad(wide, (0, -wide.shape[1] % per_word)).unflatten(1, (-1, per_word))
    words = (wide << (torch.arange(per_word) * bits)).sum(2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _weight_only(layer: QuantLinear, dtype: torch.dtype) -> tuple[Scheme, dict[str, Tensor]]:
    spec = layer.spec
    if spec.levels != 1:
        raise Inexpressible("weight-only layers of two levels have integer steps per group")
    if spec.input.rotation:
        raise Inexpressible(f"an online rotation ({spec.input.rotation})")
    if spec.input.per_channel:
        raise Inexpressible("a multiplication per input channel that nothing in front could take up")
    bits = container_bits(spec.weight_bits)  # narrower codes lie in a wider field and stay what they are
    codes = layer.integer_weight()
    stored = {
        "weight_packed": pack_words(codes, bits),
        "weight_scale": layer.weight_scale.reshape(spec.outputs, -1).to(dtype),
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }
    if spec.zeros == "float":
        raise Inexpressible("zero points that are no integers")
    if layer.weight_zero is not None:
        zero = layer.weight_zero.reshape(spec.outputs, -1)
        half = 1 << (bits - 1)
        if int(zero.min()) < -half or int(zero.max()) >= half:
            raise Inexpressible(f"zero points that reach {int(zero.min())}..{int(zero.max())}, outside int{bits}")
        stored["weight_zero_point"] = pack_words(zero.T, bits).T.contiguous()
    return Scheme("float", bits, spec.group_size, spec.zeros != "none"), stored


def _one_multiplier(tensors: dict[str, Tensor], spec: InputSpec) -> Tensor:
    """The static multiplier (1,) of an input, which one step for the tensor can express."""
    if spec.rotation:
        raise Inexpressible(f"an online rotation ({spec.rotation})")
    multiplier, shift = tensors["input_quantizer.multiplier"], tensors.get("input_quantizer.shift")
    if bool((multiplier != multiplier[0]).any()):
        raise Inexpressible("a static step for each input channel that nothing in front could take up")
    if shift is not None and bool(shift.any()):
        raise Inexpressible("offsets behind the static step (staggered copies or shifted channels)")
    return multiplier[:1]


def _dynamic_index(tensors: dict[str, Tensor], spec: InputSpec) -> Tensor | None:
    if spec.rotation:
        raise Inexpressible(f"an online rotation ({spec.rotation})")
    if spec.left:
        raise Inexpressible("an online Kronecker product")
    if spec.per_channel:
        raise Inexpressible("a multiplication per input channel that nothing in front could take up")
    if spec.merges:
        raise Inexpressible("channels that are summed at run time")
    index = tensors.get("input_quantizer.index")
    if index is not None and index.unique().numel() != spec.in_width:
        raise Inexpressible("dropped channels, which would take part in the scale of a token")
    return index


def _sum_copies(weight: Tensor, index: Tensor, channels: int) -> Tensor:
    """int8 (outputs, channels): columns of the same channel summed, zeros for channels that nothing reads."""
    total = torch.zeros(weight.shape[0], channels, dtype=torch.int32)
    total.index_add_(1, index.long(), weight.to(torch.int32))
    low, high = int(total.min()), int(total.max())
    if low < INT8.min or high > INT8.max:
        raise Inexpressible(f"copies of a channel whose summed weights reach {low}..{high}, outside int8")
    return total.to(torch.int8)
