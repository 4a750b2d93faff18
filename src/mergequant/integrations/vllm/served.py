"""Linear layers and norms as vLLM's modules hold them: loaded as the checkpoint has them, then put into tiles.

Knows tensors and this project's modules only, nothing of vLLM, so that a machine without a GPU can test it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import cast

import torch
from torch import Tensor, nn

from mergequant import ops
from mergequant.checkpoint import expected_tensors
from mergequant.errors import CheckpointError, UsageError
from mergequant.integrations.vllm.placement import Place, Placement
from mergequant.integrations.vllm.shards import ColumnShare, Share, column_share, mixes_channels, rows_of
from mergequant.nn import InputQuantizer, LinearSpec, NormSpec, QuantLinear, QuantNorm, Spec
from mergequant.ops import backends

__all__ = ["Kernel", "ServedLinear", "ServedNorm"]

GATE_GROUP = 8  # rows that `ops.interleave_rows` keeps together
WARM_TOKENS = tuple(2**n for n in range(8))  # kernels for fewer than 128 rows differ by the power of two at most
QUANTIZER = ("multiplier", "index", "shift", "left", "right")
SERVED_FIELDS = {
    "outputs",
    "input",
    "weight_bits",
    "group_size",
    "bias",
    "levels",
    "zeros",
    "exponent",
}  # of LinearSpec
EXPORT = "serve it through `mergequant export --format compressed-tensors`"

Codes = tuple[Tensor, Tensor | None]  # int8 (..., width), float32 token scales (..., 1)


@dataclass(frozen=True)
class Kernel:
    """What serves a layer: its name, sizes on this GPU, how inputs and weights are coded, op, and the op's backend."""

    layer: str
    outputs: int
    width: int
    scheme: str
    op: str
    backend: str


class ServedNorm(QuantNorm):
    """A norm of vLLM's calling convention, which emits codes."""

    def __init__(self, name: str, spec: NormSpec) -> None:
        if spec.norm != "rms":
            raise UsageError(f"{name}: the models served here have RMSNorm, the checkpoint describes {spec.norm!r}")
        super().__init__(spec)
        self.name = name

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        """Codes (or floats) of hidden (..., channels); with a residual, of their sum, beside the sum (in place)."""
        if residual is None:
            return super().forward(hidden)
        spec = self.spec
        if self.gives_floats:
            return ops.add_rmsnorm(hidden, residual, self.multiplier, spec.eps, self.shift), residual
        codes = ops.add_rmsnorm_quant(hidden, residual, self.multiplier, self.index, self.shift, spec.eps, spec.bits)
        return codes, residual

    def warm(self, dtype: torch.dtype) -> None:
        """Run for few tokens, in `dtype`, so that no request waits for a compiler: vLLM itself tries many tokens."""
        for tokens in WARM_TOKENS:
            hidden = torch.zeros(tokens, self.spec.channels, dtype=dtype, device=self.multiplier.device)
            self(hidden)
            self(hidden, torch.zeros_like(hidden))

    def place(self, placement: Placement) -> None:
        """Tell the loader where this norm's tensors go."""
        _place_all(placement, self.name, self.spec, self)


class ServedLinear(nn.Module):
    """One or several linear layers that read one tensor, as one GEMM on one GPU.

    Buffers, after `finish`:
        tiles: uint8, rows of all layers under each other; with a float input instead
        weight: (outputs, width) in the model's dtype.
        weight_scale, bias: float32 (outputs,).

    Args:
        layers: descriptions of the whole layers, by full name, in the order in which their outputs stand.
        local: rows of each on this GPU.
        share: which GPU.
        cuts_columns: o and down: all rows of some columns, instead of some rows of all columns.
        dtype: of float results.
        gather: (..., channels of a GPU) to (..., channels of all GPUs).

    Raises:
        UsageError: layers that cannot be one GEMM, or that have no kernel here.
        CheckpointError: rows or columns that do not fill the GPUs.
    """

    tiles: Tensor
    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        layers: Mapping[str, Spec],
        local: Sequence[int],
        share: Share,
        cuts_columns: bool,
        dtype: torch.dtype,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.layers = {name: _servable(name, spec) for name, spec in layers.items()}
        self.share, self.cuts_columns, self.dtype = share, cuts_columns, dtype
        self.gather = gather
        names, specs = list(self.layers), list(self.layers.values())
        self.spec = specs[0]
        for name, spec in self.layers.items():
            if spec.input != self.spec.input or spec.gemm_bits != self.spec.gemm_bits:
                raise UsageError(
                    f"{name} and {names[0]} read one tensor in vLLM, and are quantized in two ways here; quantize the "
                    f"model with one setting for both, or {EXPORT}"
                )
        self.starts = [
            0 if cuts_columns else rows_of(n, s.outputs, rows, share)
            for (n, s), rows in zip(self.layers.items(), local)
        ]
        self.staged: nn.ModuleList | None = nn.ModuleList(
            QuantLinear(replace(spec, outputs=rows)) for spec, rows in zip(specs, local)
        )
        self.quantizer: InputQuantizer | None = None
        self.columns: ColumnShare | None = None
        self.own: slice | None = None  # of the codes of whole tokens
        self.gated = False  # the input is gate and up, and SwiGLU is this layer's first work
        self.out_bits = 0  # of codes that come out
        self._consumer: tuple[ServedLinear, ...] = ()  # not a child: down, whose codes gate and up give at once

    @property
    def name(self) -> str:
        """The layers' names, for reports."""
        first, *rest = self.layers
        return "/".join([first, *(name.rpartition(".")[2] for name in rest)])

    @property
    def floats(self) -> bool:
        """Whether weights alone are quantized."""
        return self.spec.input.kind == "float"

    @property
    def gathers_input(self) -> bool:
        """Whether the input comes from all GPUs before it becomes codes."""
        return self.cuts_columns and self.share.size > 1 and mixes_channels(self.spec.input)

    def feed(self, down: "ServedLinear") -> None:
        """Gate and up in one, with nothing between them and `down`: SwiGLU and the codes of `down`'s input are the last
        work of this product if those are round(x * multiplier), else the first of `down`'s. To be said before `finish`.
        """
        source = down.spec.input
        scaled = source.kind == "static" and not (source.rotation or source.gathers or source.shifts)
        rows = [part.spec.outputs for part in self._parts()]
        if scaled and not self.floats and len(rows) == 2 and rows[0] == rows[1] and rows[0] % GATE_GROUP == 0:
            self._consumer = (down,)
        else:
            down.gated = True

    def place(self, placement: Placement) -> None:
        """Tell the loader where these layers' tensors go."""
        for (name, spec), start, staged in zip(self.layers.items(), self.starts, self._parts()):
            _place_all(placement, name, spec, staged, start)

    def multiplier(self) -> Tensor:
        """1 / step of the own channels, float32 (channels,) or (1,), of a static input that is only scaled."""
        quantizer = self.quantizer
        if quantizer is None:
            part = self._parts()[0]
            assert part.input_quantizer is not None  # static
            quantizer = column_share(self.name, self.spec.input, None, self.share).quantizer(part.input_quantizer)
        return cast(Tensor, quantizer.multiplier)

    def finish(self) -> None:
        """Put what was loaded into the form that kernels read, and give the rest up. May be repeated.

        Raises:
            CheckpointError: layers of one GEMM whose inputs are coded differently.
        """
        if self.staged is None:
            return
        parts = self._parts()
        first = parts[0].input_quantizer
        for name, part in zip(self.layers, parts):
            if not _same(first, part.input_quantizer):
                raise CheckpointError(f"{name}: its input is coded unlike {self.name}'s, and vLLM fuses them")
        index = None if first is None else first.index
        if self.cuts_columns:
            self.columns = column_share(self.name, self.spec.input, index, self.share)
            first = None if first is None else self.columns.quantizer(first)
            if self.columns.whole:
                self.own = slice(int(self.columns.columns[0]), int(self.columns.columns[-1]) + 1)
        self.quantizer = first
        weights = [part.decoded_weight().to(self.dtype) if self.floats else part.integer_weight() for part in parts]
        if self.columns is not None:
            weights = [self.columns.take(weight) for weight in weights]
        scales, biases = [part.weight_scale for part in parts], self._biases(parts)
        if self.floats:
            self.register_buffer("weight", torch.cat(weights), persistent=False)
        elif self._consumer:
            self.out_bits = self._consumer[0].spec.input.bits
            multiplier = self._consumer[0].multiplier()
            weights = [ops.interleave_rows(*weights)]
            scales = [ops.interleave_rows(scales[0], scales[1] * multiplier)]
            biases = biases and [ops.interleave_rows(biases[0], biases[1] * multiplier)]
        if not self.floats:
            self.register_buffer("tiles", ops.tile_weight(torch.cat(weights), self.spec.gemm_bits), persistent=False)
            self.register_buffer("weight_scale", torch.cat(scales), persistent=False)
        self.register_buffer("bias", None if biases is None else torch.cat(biases), persistent=False)
        self.width = weights[0].shape[1]
        self.staged = None

    def forward(self, x: Tensor) -> Tensor:
        """Codes (..., width) or floats (..., channels; gate and up if `gated`) to floats or codes (..., outputs)."""
        if self.floats:
            return self._float_product(x)
        codes, scale = self._codes(x)
        return self._multiply(codes, scale)

    def warm(self) -> None:
        """As a norm's; on all GPUs at the same time, where the input is gathered."""
        source, device = self.spec.input, (self.weight if self.floats else self.tiles).device
        width, dtype = source.in_width // (self.share.size if self.cuts_columns else 1), self.dtype
        if source.kind == "codes":
            width, dtype = self.width, torch.int8
        for tokens in WARM_TOKENS:
            self(torch.zeros(tokens, 2 * width if self.gated else width, dtype=dtype, device=device))

    def kernel(self) -> Kernel:
        """What serves this layer."""
        spec, source = self.spec, self.spec.input
        scheme = f"int{spec.weight_bits} weights, {source.kind}"
        if self.floats:
            return Kernel(self.name, self.weight.shape[0], self.width, scheme, "linear", "torch, decoded weights")
        scheme += f" int{source.bits}" + (f", {source.rotation}" if source.rotation else "")
        scheme += ", input gathered from all GPUs" if self.gathers_input else ""
        op = "tiled_swiglu_quant" if self.out_bits else "tiled_linear"
        backend = backends.choose(op, self.tiles.device)
        return Kernel(self.name, self.weight_scale.shape[0], self.width, scheme, op, backend)

    def _codes(self, x: Tensor) -> Codes:
        quantizer = self.quantizer
        if quantizer is None or x.dtype == torch.int8:
            return x, None
        if self.gated:
            spec = quantizer.spec
            static, rotated = spec.kind == "static", bool(spec.rotation)
            apart = self.gathers_input or bool(spec.left) or (not static and (spec.per_channel or spec.gathers))
            if not apart and static:
                assert quantizer.multiplier is not None  # of every static input
                quantize = ops.silu_mul_hadamard_quant if rotated else ops.silu_mul_quant
                return quantize(x, quantizer.multiplier, quantizer.index, quantizer.shift, spec.bits), None
            if not apart:
                dynamic = ops.silu_mul_hadamard_dynamic_quant if rotated else ops.silu_mul_dynamic_quant
                codes, scale = dynamic(x, spec.clip_ratio, spec.bits)
                return codes, scale
            x = ops.silu_mul(x)
        codes, scale = quantizer(self._all(x))
        return (codes if self.own is None else codes[..., self.own].contiguous()), scale

    def _all(self, x: Tensor) -> Tensor:
        if not self.gathers_input:
            return x
        if self.gather is None:
            raise UsageError(
                f"{self.name}: {self.spec.input.rotation or 'its input'} needs all channels, and none gathers"
            )
        return self.gather(x)

    def _multiply(self, codes: Tensor, token_scale: Tensor | None) -> Tensor:
        bits, scale, bias = self.spec.gemm_bits, self.weight_scale, self.bias
        if self.out_bits:
            return ops.tiled_swiglu_quant(codes, self.tiles, scale, token_scale, bias, bits, self.out_bits)
        return ops.tiled_linear(codes, self.tiles, scale, token_scale, bias, bits, self.dtype)

    def _float_product(self, x: Tensor) -> Tensor:
        x = self._all(ops.silu_mul(x) if self.gated else x)
        if self.quantizer is not None:
            x = self.quantizer.scaled(x).to(self.dtype)
        if self.spec.input.rotation:
            x = ops.hadamard_transform(x).to(self.dtype)
        if self.own is not None:
            x = x[..., self.own]
        return nn.functional.linear(x, self.weight, None if self.bias is None else self.bias.to(self.dtype))

    def _biases(self, parts: Sequence[QuantLinear]) -> list[Tensor] | None:
        """Biases, zeros for layers without; None if none has one, and on all GPUs but one of those that are summed."""
        if all(part.bias is None for part in parts) or (self.cuts_columns and self.share.rank):
            return None
        return [torch.zeros_like(part.weight_scale) if part.bias is None else part.bias for part in parts]

    def _parts(self) -> list[QuantLinear]:
        if self.staged is None:
            raise UsageError(f"{self.name}: its weights lie in tiles already; start the engine anew to load others")
        return [cast(QuantLinear, part) for part in self.staged]

    def extra_repr(self) -> str:
        return f"{self.name}, int{self.spec.weight_bits}, input {self.spec.input.kind}, {self.share}"


def _servable(name: str, spec: Spec) -> LinearSpec:
    plain = type(spec) is LinearSpec
    for field in fields(spec):
        if field.name not in SERVED_FIELDS and getattr(spec, field.name) != field.default:
            plain = False
    if not plain:
        raise UsageError(
            f"{name}: vLLM has no kernel here for a layer described as {spec.to_dict()}; use `mergequant.load` "
            "for this checkpoint"
        )
    return cast(LinearSpec, spec)


def _place_all(placement: Placement, name: str, spec: Spec, module: nn.Module, start: int = 0) -> None:
    """Places of a layer's tensors: rows from `start` where the buffer holds fewer than are stored."""
    own = module.state_dict(keep_vars=True)
    for full, (dtype, shape) in expected_tensors(name, spec).items():
        buffer = own[full.removeprefix(name + ".")]
        whole = tuple(buffer.shape) == shape
        placement.add(full, Place(buffer, dtype, shape, None if whole else 0, 0 if whole else start))


def _same(first: InputQuantizer | None, other: InputQuantizer | None) -> bool:
    if first is None or other is None:
        return first is other
    pairs = ((getattr(first, name), getattr(other, name)) for name in QUANTIZER)
    return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)
