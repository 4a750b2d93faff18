"""The last step of a site: weights become codes, and the float modules are replaced by quantized ones."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from mergequant.calibration import SiteContext
from mergequant.errors import RecipeError
from mergequant.grids import (
    AbsMax,
    AcrossTensor,
    ClipSearch,
    CodebookTensor,
    IntegerGrid,
    PowerGrid,
    QTensor,
    Quantizer,
    SparseTensor,
    TwoLevelQuantizer,
    TwoLevelTensor,
    fitting_group,
)
from mergequant.grids.two_level import TWO_LEVEL_BITS
from mergequant.models import BiasedNorm
from mergequant.nn import CodebookLinear, InputSpec, LinearSpec, NormSpec, QuantLinear, QuantNorm, SparseLinear
from mergequant.nn.spec import FLOAT_BITS, ZeroKind
from mergequant.solvers import (
    CodebookSolution,
    Descent,
    OutlierShare,
    Solution,
    gptq,
    invert_hessian,
    quantease,
    quantease_outliers,
    rtn,
    two_level,
)
from mergequant.steps.base import SiteStep, near_name
from mergequant.steps.judge import RoundingName
from mergequant.transforms import ChannelScheme, FloatScheme, Kronecker, ReassembledScheme, TensorScheme, TokenScheme

__all__ = ["Round"]

WHOLE_BITS = (4, 8)  # codes that fill bytes as they are


@dataclass(frozen=True)
class Round(SiteStep):
    """Round the (folded, compensated) weights of a site and put quantized modules in place.

    GPTQ's Hessian is that of the codes themselves in their reconstructed order (digest, step 7), shared by all
    consumers of the site.

    Attributes:
        method: "gptq", "rtn", or "quantease": coordinate descent from `start` ("gptq" makes it a polisher, which never
            ends above GPTQ; the paper starts from "float") in `sweeps` passes, some of them relaxed with `relax`.
        bits: bits of the weight codes.
        group_size: columns per weight scale; 0 = a scale per row. Only for float inputs, or with two levels.
        fit_groups: where the group size does not divide a width, take a smaller one that does, or a scale per row
            (`grids.fitting_group`), instead of refusing.
        clip: search the range of each row (exponent `clip_norm`); else absmax.
        damping, activation_order: as in GPTQ.
        hessian: of which inputs: "quantized" = of the codes, as above; "float" = before they are rounded.
        levels: 2 = int8 per row, and inside these codes 4-bit groups with integer steps and zeros (QServe): still one
            integer GEMM. `clip` then searches the steps of groups.
        zeros: an integer zero point beside every scale, for float inputs (`grids.Quantizer`).
        outliers: share of the weights that stay in 16 bits beside the codes; only for "quantease" and float inputs.
        whole_columns: outliers are columns, not single weights.
        dense: store codes of 2, 3, 5, 6 or 7 bits in as many bits, not in 4 or 8.
        static_groups: with groups, GPTQ takes their scales from the weights as they were. False: when it comes to them,
            from weights that already make up for others' errors; that needs the natural order.
    """

    name: ClassVar[str] = "round"
    method: RoundingName = "gptq"
    bits: int = 4
    group_size: int = 0
    clip: bool = True
    clip_norm: float = 2.4
    damping: float = 0.01
    activation_order: bool = True
    hessian: Literal["quantized", "float"] = "quantized"
    fit_groups: bool = False
    levels: Literal[1, 2] = 1
    zeros: bool = False
    start: Literal["float", "rtn", "gptq"] = "gptq"
    sweeps: int = 10
    relax: bool = False
    dense: bool = False
    outliers: float = 0.0
    whole_columns: bool = False
    static_groups: bool = True

    def group_of(self, width: int) -> int:
        """Group size for a row of `width` columns; 0 = a scale per row."""
        return fitting_group(width, self.group_size) if self.fit_groups else self.group_size

    def __post_init__(self) -> None:
        if self.method not in get_args(RoundingName):
            raise RecipeError(f"round: method {self.method!r}{near_name(self.method, get_args(RoundingName))}")
        if not self.static_groups and (self.method != "gptq" or self.activation_order or self.levels == 2):
            raise RecipeError(
                "round: scales of groups that follow compensated weights (static_groups=False) are for method gptq, "
                "one level, in the natural order; set activation_order=False"
            )
        if self.levels not in (1, 2) or (self.levels == 2 and self.bits != TWO_LEVEL_BITS):
            raise RecipeError(f"round: levels {self.levels} with {self.bits} bits; two levels are for 4-bit weights")
        if self.levels == 2 and self.method == "quantease":
            raise RecipeError("round: coordinate descent knows grids of one level; round two levels by gptq or rtn")
        if self.outliers and (self.method != "quantease" or self.start == "gptq"):
            raise RecipeError(
                "round: outliers beside the codes are for method quantease, started from float or rtn; recipes spqr "
                "and gwq find theirs in other ways"
            )
        if self.zeros and self.levels == 2:
            raise RecipeError("round: groups of two levels have integer zeros already; leave out zeros")

    def run(self, context: SiteContext) -> None:
        bits = context.block.measured.get(f"bits.{context.name}")  # of `allocate_bits`, if the recipe has that step
        if bits is not None and (int(bits), True) != (self.bits, self.dense):
            context.report(bits=float(bits))
            replace(self, bits=int(bits), dense=True).run(context)
            return
        scheme = context.scheme
        if self.group_size and self.levels == 1 and not isinstance(scheme, FloatScheme):
            raise RecipeError(
                f"{context.name}: groups of {self.group_size} along the reduction axis would break the single integer "
                "GEMM; use group_size=0, or leave the input in floating point"
            )
        if (self.zeros or self.outliers) and not isinstance(scheme, FloatScheme):
            raise RecipeError(
                f"{context.name}: zero points and outliers of weights do not fit the single integer GEMM; use "
                "zeros=False and outliers=0, or leave the input in floating point"
            )
        if context.targets is None:
            context.targets = {name: scheme.fold(weight) for name, weight in context.weights.items()}
        group_size = self.group_of(context.site.width)
        gram = None
        if self.method != "rtn":
            gram = context.gram(scheme.exact_values if self.hessian == "float" else scheme.values).total
        context.solutions = self.solve_site(context, gram)
        solution = next(iter(context.solutions.values()))
        if solution.attempts:
            context.report(damping=solution.damping, cholesky_attempts=float(solution.attempts))
        context.report(output_error=held_out_error(context))
        replace_modules(context, self.bits, group_size, dense=self.dense)

    def solve_site(self, context: SiteContext, gram: Tensor | None) -> dict[str, Solution]:
        """Rounded targets of a site by consumer; `gram` (width, width) is that of its inputs, None for RTN."""
        # Rows are independent, so all consumers of the site are rounded in one sweep.
        targets = context.targets or {}
        solution = self.solve(torch.cat(list(targets.values())), gram, self.group_of(context.site.width) or None)
        solutions, first = {}, 0
        for name, target in targets.items():
            solutions[name] = solution.rows(first, first + target.shape[0])
            first += target.shape[0]
        return solutions

    def quantizer(self, group_size: int | None) -> Quantizer:
        """Grid and ranges of one level."""
        search = ClipSearch(norm=self.clip_norm) if self.clip else AbsMax()
        return Quantizer(IntegerGrid(self.bits), group_size, search, self.zeros)

    def solve(self, weight: Tensor, gram: Tensor | None, group_size: int | None) -> Solution:
        """One weight (outputs, width), rounded; groups run along its rows."""
        inverse = None
        if gram is not None and self.method == "gptq":
            inverse = invert_hessian(gram, damping=self.damping, activation_order=self.activation_order)
        if self.levels == 2:
            return two_level(weight, inverse, TwoLevelQuantizer(group_size, self.clip))
        quantizer = self.quantizer(group_size)
        if gram is not None and self.method == "quantease":
            descent = Descent(self.start, self.sweeps, self.relax, self.activation_order, self.damping)
            if self.outliers:
                share = OutlierShare(self.outliers, self.whole_columns)
                return quantease_outliers(weight, gram, quantizer, share, descent)
            return quantease(weight, gram, quantizer, descent)
        if inverse is None:
            return rtn(weight, quantizer)
        return gptq(weight, inverse, quantizer, static_groups=self.static_groups)


def held_out_error(context: SiteContext, tokens: int = 2048) -> float:
    """||values(X) Q^T - X W^T||^2 / ||X W^T||^2 on held-out tokens, all consumers together."""
    sample = context.sample("held_out", tokens)
    values = context.scheme.values(sample)
    error = reference = 0.0
    for name, weight in context.weights.items():
        target = sample @ weight.t()
        error += float((values @ context.solutions[name].quantized.decode().t() - target).square().sum())
        reference += float(target.square().sum())
    return error / max(reference, 1e-30)


def replace_modules(context: SiteContext, bits: int, group_size: int, *, dense: bool = False) -> None:
    """Build the site's quantized modules from scheme and solutions, put them in place, move steps where they belong."""
    scheme = context.scheme
    block, site = context.block, context.site
    absorbed = isinstance(scheme, ChannelScheme) and _migrate(context, scheme)
    spec, buffers = _held(context, *_input_spec(context, absorbed))
    for name, solution in context.solutions.items():
        old = block.linear(name)
        block.replace(name, _quant_linear(spec, buffers, solution, old, bits, group_size, dense).to(block.device))
    if site.norm is None:
        return
    if isinstance(scheme, ChannelScheme):
        block.replace(site.norm.name, _quant_norm(context, scheme).to(block.device))
    elif isinstance(norm := block.module.get_submodule(site.norm.name), BiasedNorm):
        block.replace(site.norm.name, _biased_norm(norm).to(block.device))


def _migrate(context: SiteContext, scheme: ChannelScheme) -> bool:
    """Let a linear producer absorb 1 / step; True if it did.

    A norm absorbs it in `_quant_norm`; behind an online rotation nothing can, and the multiplier stays with the input.
    """
    producer = context.site.producer
    if context.site.norm is not None or producer is None or context.rotation:
        return False
    channel = torch.tensor(producer.channel, device=scheme.step.device)
    step = torch.zeros(producer.rows.stop - producer.rows.start, device=scheme.step.device)
    step[channel] = scheme.step  # the channels of one row have one step: `tie_channels`
    # A dead row keeps its scale: its codes meet weights of zero.
    factor = torch.where(step > 0, 1 / step, torch.ones_like(step))
    context.block.absorb(producer, factor)
    if context.site.kind == "attention_output":
        context.block.absorb_in_prefix(factor)
    return True


def _input_spec(context: SiteContext, absorbed: bool) -> tuple[InputSpec, dict[str, Tensor]]:
    scheme, width = context.scheme, context.site.width
    if context.transform is not None and not isinstance(scheme, TokenScheme):
        raise RecipeError(f"{context.name}: an online transform needs dynamic inputs; put token_input behind it")
    if isinstance(scheme, FloatScheme):
        return InputSpec("float", width, width, rotation=context.rotation), {}
    if isinstance(scheme, TokenScheme):
        spec = InputSpec("dynamic", width, width, scheme.bits, context.rotation, clip_ratio=scheme.clip_ratio)
        return _transformed(spec, context.transform)
    if isinstance(scheme, ReassembledScheme):
        spec = InputSpec("dynamic", width, scheme.width, scheme.bits, gathers=True, merges=scheme.merges)
        return spec, {"index": scheme.index.to(torch.int32)}
    if isinstance(scheme, TensorScheme):
        spec = InputSpec("static", width, width, scheme.bits, context.rotation)
        return spec, {"multiplier": torch.tensor([1 / scheme.step])}
    if context.site.norm is not None:
        return InputSpec("codes", scheme.width, scheme.width, scheme.bits), {}
    buffers = {}
    if not absorbed:
        buffers["multiplier"] = scheme.multiplier
    if not scheme.is_plain:
        buffers["index"] = scheme.index.to(torch.int32)
    if bool(scheme.offset.any()):
        buffers["shift"] = scheme.offset
    spec = InputSpec(
        "static",
        width,
        scheme.width,
        scheme.bits,
        context.rotation,
        per_channel=not absorbed,
        gathers="index" in buffers,
        shifts="shift" in buffers,
    )
    return spec, buffers


def _held(context: SiteContext, spec: InputSpec, buffers: dict[str, Tensor]) -> tuple[InputSpec, dict[str, Tensor]]:
    """An input that was scaled or shifted where nothing in front could take it up: the quantizer does, or folds it into
    the multiplier that it has anyway."""
    if context.site.name not in context.block.held:
        return spec, buffers
    own, moved = (part.float() for part in context.block.held[context.site.name])
    if spec.kind == "static":
        if spec.rotation:
            raise RecipeError(
                f"{context.name}: a scale per channel cannot stay in front of an online rotation with static steps; "
                "leave out the scaling, or quantize dynamically"
            )
        index = buffers["index"].long() if "index" in buffers else slice(None)
        step = buffers["multiplier"].to(own)
        moved = moved[index] * step + buffers.get("shift", torch.zeros(())).to(own)
        own = own[index] * step
    buffers = {**buffers, "multiplier": own}
    if bool(moved.any()):
        buffers["shift"] = moved
    return replace(spec, per_channel=True, shifts="shift" in buffers), buffers


def _transformed(spec: InputSpec, transform: Kronecker | None) -> tuple[InputSpec, dict[str, Tensor]]:
    """A dynamic input behind an online transform, whose factors are stored."""
    if transform is None:
        return spec, {}
    left, right = transform.left, transform.right
    order = 0 if right is None else right.shape[0]
    buffers = {"left": left} if right is None else {"left": left, "right": right}
    return replace(spec, left=left.shape[0], right=order), buffers


def _quant_linear(
    spec: InputSpec,
    buffers: dict[str, Tensor],
    solution: Solution | CodebookSolution,
    old: nn.Linear,
    bits: int,
    group_size: int,
    dense: bool,
) -> QuantLinear:
    quantized = solution.quantized
    bias: Tensor | None = old.bias
    if isinstance(quantized, SparseTensor):
        module: QuantLinear = SparseLinear.of(quantized, spec, bias is not None)
    elif isinstance(quantized, CodebookTensor):
        module = CodebookLinear.of(quantized, spec, bias is not None)
    else:
        module = _integer_linear(quantized, spec, bits, group_size, bias is not None, dense)
    module.out_dtype = old.weight.dtype
    if bias is not None and module.bias is not None:
        module.bias.copy_(bias.detach())
    if module.input_quantizer is not None:
        module.input_quantizer.out_dtype = old.weight.dtype
        for name, value in buffers.items():
            getattr(module.input_quantizer, name).copy_(value)
    return module


def _integer_linear(
    quantized: QTensor, spec: InputSpec, bits: int, group_size: int, bias: bool, dense: bool
) -> QuantLinear:
    """The layer that holds integer codes, its bias still 0."""
    levels = 2 if isinstance(quantized, TwoLevelTensor) else 1
    zeros: ZeroKind = "none"
    zero: Tensor | None = getattr(quantized, "zero", None)
    if zero is not None:
        zeros = "float" if zero.is_floating_point() else "integer"
    across, grid = isinstance(quantized, AcrossTensor), quantized.grid
    module = QuantLinear(
        LinearSpec(
            quantized.codes.shape[0],
            spec,
            bits,
            quantized.size if isinstance(quantized, AcrossTensor) else group_size,
            bias,
            levels,
            zeros,
            across,
            grid.exponent if isinstance(grid, PowerGrid) else 1.0,
            dense and bits not in WHOLE_BITS,
        )
    )
    module.weight_codes.copy_(module.pack(quantized.codes))
    module.weight_scale.copy_(quantized.scale.reshape(module.weight_scale.shape))
    if isinstance(quantized, TwoLevelTensor) and module.group_scale is not None and module.group_zero is not None:
        module.group_scale.copy_(quantized.group_scale)
        module.group_zero.copy_(quantized.group_zero)
    if zero is not None and module.weight_zero is not None:
        module.weight_zero.copy_(zero.reshape(module.weight_zero.shape))
    return module


def _quant_norm(context: SiteContext, scheme: ChannelScheme) -> QuantNorm:
    role = context.site.norm
    if role is None:
        raise RecipeError(f"{context.name}: only a norm site has a norm to replace")
    old = context.block.module.get_submodule(role.name)
    multiplier = role.gain(old).float()[scheme.index] * scheme.multiplier
    shift = scheme.offset.clone()
    bias = role.bias(old)
    if bias is not None:
        shift += bias.float()[scheme.index] * scheme.multiplier
    gathers, shifts = not scheme.is_plain, bool(shift.any())
    spec = NormSpec(role.kind, role.width, scheme.width, scheme.bits, role.eps, gathers, shifts)
    module = QuantNorm(spec)
    module.multiplier.copy_(multiplier)
    if gathers and module.index is not None:
        module.index.copy_(scheme.index)
    if shifts and module.shift is not None:
        module.shift.copy_(shift)
    return module


def _biased_norm(norm: BiasedNorm) -> QuantNorm:
    """A norm that has been given a bias, as a checkpoint holds it: the architecture has no place for the bias."""
    role = norm.role
    module = QuantNorm(NormSpec(role.kind, role.width, role.width, FLOAT_BITS, role.eps, shifts=True))
    module.out_dtype = norm.weight.dtype
    module.multiplier.copy_(role.gain(norm))
    if module.shift is not None:
        module.shift.copy_(norm.bias)
    return module
