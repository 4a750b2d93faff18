"""From loaded modules to parts of a layer: weights that read one tensor are put into common tiles, once.

The modules take the tiles over (`QuantLinear.adopt`), so that the model's own forward goes on working and no weight is
in memory twice.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from mergequant import ops
from mergequant.nn import QuantLinear, QuantNorm
from mergequant.runtime.layer import GatedMLP
from mergequant.runtime.parts import (
    Branch,
    FloatNorm,
    FusedGate,
    ModuleLinear,
    Norm,
    Projection,
    Quantizer,
    QuantizingNorm,
    TiledLinear,
)

__all__ = ["build_mlp", "build_norm", "build_projection"]

GATE_GROUP = 8  # rows that `ops.interleave_rows` keeps together


def build_norm(module: nn.Module, eps: float) -> Norm:
    """An RMSNorm, quantizing or not."""
    if not isinstance(module, QuantNorm):
        return FloatNorm(cast(Tensor, module.weight), eps)
    spec = module.spec
    if module.gives_floats:
        return FloatNorm(module.multiplier, spec.eps, module.shift)
    return QuantizingNorm(module.multiplier, module.index, module.shift, spec.eps, spec.bits)


def build_projection(modules: Sequence[nn.Module]) -> Projection:
    """Linear layers that read one tensor: one GEMM if their inputs are quantized alike, else a GEMM each."""
    if isinstance(modules[0], QuantLinear) and all(_reads_alike(modules[0], module) for module in modules):
        layers = [module for module in modules if isinstance(module, QuantLinear)]
        return Projection((Branch(build_quantizer(layers[0]), _tiled(layers)),))
    return Projection(tuple(_alone(module) for module in modules))


def build_mlp(gate: nn.Module, up: nn.Module, down: nn.Module) -> GatedMLP:
    """SwiGLU and down, with as much in the GEMMs' epilogues as down's input allows."""
    down_part = build_projection([down])
    quantizer = down_part.quantizer
    fusable = (
        isinstance(gate, QuantLinear)
        and isinstance(up, QuantLinear)
        and gate.spec.input.kind != "float"
        and _reads_alike(gate, up)
        and gate.spec.outputs % GATE_GROUP == 0
    )
    if fusable and quantizer is not None and quantizer.scales_only:
        assert quantizer.multiplier is not None  # what scales_only says
        gate_layer, up_layer = cast(QuantLinear, gate), cast(QuantLinear, up)
        return GatedMLP(_fused_gate(gate_layer, up_layer, quantizer.multiplier, quantizer.bits), down_part)
    return GatedMLP(build_projection([gate, up]), down_part)


def build_quantizer(layer: QuantLinear) -> Quantizer | None:
    """What turns a layer's float input into codes; None where a norm emits them."""
    module, spec = layer.input_quantizer, layer.spec.input
    if module is None:
        return None
    vectors = module.multiplier, module.index, module.shift
    return Quantizer(spec.bits, *vectors, bool(spec.rotation), spec.clip_ratio, module.left, module.right, spec.merges)


def _reads_alike(first: QuantLinear, other: nn.Module) -> bool:
    """Whether the codes of one layer's input are those of another's, and their tiles hold codes of one width."""
    if not isinstance(other, QuantLinear) or first.spec.input.kind == "float" or first.spec.input != other.spec.input:
        return False
    if first.spec.gemm_bits != other.spec.gemm_bits:
        return False
    mine, theirs = first.input_quantizer, other.input_quantizer
    if mine is None or theirs is None or mine is theirs:
        return mine is theirs
    pairs = ((getattr(mine, name), getattr(theirs, name)) for name in ("multiplier", "index", "shift", "left", "right"))
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


def _alone(module: nn.Module) -> Branch:
    if isinstance(module, QuantLinear) and module.spec.input.kind != "float":
        return Branch(build_quantizer(module), _tiled([module]))
    return Branch(None, ModuleLinear(module))


def _tiled(layers: Sequence[QuantLinear]) -> TiledLinear:
    """Layers row under row."""
    bits = layers[0].spec.gemm_bits
    tiles = ops.tile_weight(torch.cat([layer.integer_weight() for layer in layers]), bits)
    scale, bias = torch.cat([layer.weight_scale for layer in layers]), _biases(layers)
    first = 0
    for layer in layers:
        layer.adopt(tiles, torch.arange(first, first + layer.spec.outputs))
        first += layer.spec.outputs
    return TiledLinear(tiles, scale, None if bias is None else torch.cat(bias), bits)


def _fused_gate(gate: QuantLinear, up: QuantLinear, multiplier: Tensor, out_bits: int) -> FusedGate:
    bits = gate.spec.gemm_bits
    tiles = ops.tile_weight(ops.interleave_rows(gate.integer_weight(), up.integer_weight()), bits)
    scale = ops.interleave_rows(gate.weight_scale, up.weight_scale * multiplier)
    bias = _biases([gate, up])
    fused_bias = None if bias is None else ops.interleave_rows(bias[0], bias[1] * multiplier)
    numbers = torch.arange(2 * gate.spec.outputs)
    places = ops.interleave_rows(numbers[: gate.spec.outputs], numbers[gate.spec.outputs :]).argsort()
    gate.adopt(tiles, places[: gate.spec.outputs])
    up.adopt(tiles, places[gate.spec.outputs :])
    return FusedGate(build_quantizer(gate), tiles, scale, fused_bias, bits, out_bits)


def _biases(layers: Sequence[QuantLinear]) -> list[Tensor] | None:
    """Biases of all layers, zeros for those without; None if none has one."""
    if all(layer.bias is None for layer in layers):
        return None
    return [torch.zeros_like(layer.weight_scale) if layer.bias is None else layer.bias for layer in layers]
