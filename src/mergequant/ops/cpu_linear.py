"""Integer linear layers on a CPU with prepared weights: oneDNN's product and epilogue in one pass.

`torch.ops.onednn.qlinear_pointwise` multiplies codes by weights that were put into oneDNN's own order once, and scales,
adds the bias and rounds to the output's dtype before the sums leave the cache. Nothing documents that to be exact, and
processors differ: without VNNI, sums of two products saturate in 16 bits; without AMX, signed inputs run on a reference
path that is a thousand times slower. So a form of the product is used only if it passed a trial on this processor:
results equal, bit for bit, to exact sums with the float32 epilogue of `int_linear`, in reasonable time.

Forms, in order: signed inputs (AMX), inputs shifted by 128 to unsigned (VNNI), `int8_linear` on plain weights.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mergequant.errors import KernelError
from mergequant.ops._validate import require, require_codes
from mergequant.ops.int_linear import check_linear, linear_rows
from mergequant.ops.int_matmul import backend

__all__ = ["PreparedWeight", "cpu_backend", "prepare_weight", "prepared_linear"]

SHIFT = 128  # from int8 to uint8; flipping the sign bit adds it
# For products of up to 256 results oneDNN has no fast kernel, only the reference path: weights of few outputs are kept
# plain, and multiply so up to FEW_RESULTS results.
FEWEST_OUTPUTS = 257
FEW_RESULTS = 4096
# Elements up to which weights stay plain if inputs must be shifted. Measured with oneDNN held to VNNI on a processor
# that has AMX: with AVX-512, plain weights win up to 2048 x 2048 at one token, with AVX2 hardly anywhere, and for long
# inputs of such weights the two are equal.
SMALL_SHIFTED = 1_000_000
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A fast kernel takes 1 to 5 times as long as the plain product of the trial, the reference path 200 times.
SLOWEST = 20
TRIAL_ROWS = (1, 4, 37)
TRIAL_WIDTHS = (63, 1151)


@dataclass(frozen=True)
class Form:
    """A form of the fused product that this processor computes exactly.

    Attributes:
        signed: inputs enter as they are, else shifted to unsigned.
        dtypes: what the product writes itself, exactly and fast.
    """

    signed: bool
    dtypes: frozenset[torch.dtype]


@dataclass(frozen=True, eq=False)
class PreparedWeight:
    """A weight (outputs, width) as the product of this processor wants it. Immutable: make a new one of new weights.

    Attributes:
        plain: int8 (outputs, width), for few results or where nothing is fused; None if never used.
        fused: opaque weight in oneDNN's order, int32 (outputs,) zeros, and the form of the product; None where plain
            weights are always used.
    """

    outputs: int
    width: int
    plain: Tensor | None
    fused: tuple[Tensor, Tensor, Form] | None


def prepare_weight(weight: Tensor) -> PreparedWeight:
    """Prepare int8 (outputs, width) on a CPU, once. Takes about 8 ns per element, on one core.

    Raises:
        KernelError: another dtype, shape or device.
    """
    require_codes("prepare_weight", "weight", weight)
    require(weight.dim() == 2, lambda: f"prepare_weight: weight has shape {tuple(weight.shape)}; pass (outputs, width)")
    require(weight.is_cpu, lambda: f"prepare_weight: weight is on {weight.device}; only CPUs take prepared weights")
    outputs, width = weight.shape
    weight, form = weight.contiguous(), _form()
    if form is None or weight.numel() == 0 or (not form.signed and weight.numel() <= SMALL_SHIFTED):
        return PreparedWeight(outputs, width, weight, None)
    blocked = torch.ops.onednn.qlinear_prepack(weight, None)
    few = weight if outputs < FEWEST_OUTPUTS else None
    return PreparedWeight(outputs, width, few, (blocked, torch.zeros(outputs, dtype=torch.int32), form))


def prepared_linear(
    codes: Tensor,
    weight: PreparedWeight,
    weight_scale: Tensor,
    token_scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """`int8_linear` on a prepared weight: arguments, result (bit for bit) and errors are the same.

    Not an op of the dispatcher, which would cost a tenth of a small layer's time; under `torch.compile`, call
    `int8_linear`.
    """
    check_linear("prepared_linear", codes, weight.outputs, weight.width, weight_scale, token_scale, bias, out_dtype)
    if not codes.is_cpu:
        raise KernelError(f"prepared_linear: codes are on {codes.device}; prepared weights are for CPUs")
    plain = weight.plain
    if weight.fused is None or (plain is not None and codes.numel() * weight.outputs <= FEW_RESULTS * weight.width):
        assert plain is not None  # `prepare_weight` keeps at least one
        return linear_rows(codes, plain, weight_scale, token_scale, bias, out_dtype)
    blocked, zero_points, form = weight.fused
    if token_scale is None:
        offset, dtype = bias, out_dtype if out_dtype in form.dtypes else torch.float32
    else:  # the bias is added after the token's scale
        offset, dtype = None, torch.float32
    offset = None if offset is None else offset.float().contiguous()
    value = _fused(codes, blocked, weight_scale.contiguous(), zero_points, offset, dtype, form.signed)
    if token_scale is not None:
        value.mul_(token_scale)
        if bias is not None:
            value.add_(bias)
    return value if dtype == out_dtype else value.to(out_dtype)


def cpu_backend() -> str:
    """Name of what multiplies prepared weights on this machine's CPU."""
    form = _form()
    if form is None:
        return backend(torch.device("cpu"))
    return f"oneDNN {'int8' if form.signed else 'uint8'} x int8, fused epilogue"


def _fused(
    codes: Tensor,
    blocked: Tensor,
    weight_scale: Tensor,
    zero_points: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    signed: bool,
) -> Tensor:
    entering, zero_point = (codes, 0) if signed else (codes.view(torch.uint8) ^ SHIFT, SHIFT)
    return torch.ops.onednn.qlinear_pointwise.default(
        entering, 1.0, zero_point, blocked, weight_scale, zero_points, bias, 1.0, 0, dtype, "none", [], ""
    )


@cache
def _form() -> Form | None:
    """The first form of the fused product that passes its trial here; None if none does."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return None
    with torch.device("cpu"), torch.no_grad():
        for signed in (True, False):
            dtypes = frozenset(dtype for dtype in DTYPES if _passes(signed, dtype))
            if torch.float32 in dtypes:
                return Form(signed, dtypes)
    return None


def _passes(signed: bool, dtype: torch.dtype) -> bool:
    try:
        return _is_fast(signed, dtype) and all(_is_exact(signed, dtype, width) for width in TRIAL_WIDTHS)
    except RuntimeError:  # a torch built without oneDNN, or an oneDNN without this product
        return False


def _trial(width: int) -> tuple[Tensor, ...]:
    """Codes (37, width) and weights, scales, zero points and a bias.

    Rows are, in turn, extreme (whose sums saturate where anything does), large and random (whose sums are odd numbers
    beyond the 24 bits of a float32, if they meet a float32 before they are complete) and random.
    """
    generator = torch.Generator().manual_seed(width)

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int8)

    codes, weight = draw(-128, 128, max(TRIAL_ROWS), width), draw(-128, 128, FEWEST_OUTPUTS, width)
    codes[0::4], codes[1::4], codes[2::4] = 127, -128, draw(96, 128, *codes[2::4].shape)
    weight[0::5], weight[1::5] = -128, 127
    weight[2::5], weight[3::5] = draw(-128, -96, *weight[2::5].shape), draw(96, 128, *weight[3::5].shape)
    scale = torch.rand(FEWEST_OUTPUTS, generator=generator) + 0.01
    bias = 1000 * torch.randn(FEWEST_OUTPUTS, generator=generator)
    return codes, weight, scale, torch.zeros(FEWEST_OUTPUTS, dtype=torch.int32), bias


def _is_exact(signed: bool, dtype: torch.dtype, width: int) -> bool:
    codes, weight, scale, zero_points, bias = _trial(width)
    blocked = torch.ops.onednn.qlinear_prepack(weight, None)
    value = (codes.double() @ weight.double().t()).to(torch.int32).float() * scale
    expected = {None: value.to(dtype), bias: (value + bias).to(dtype)}
    return all(
        torch.equal(_fused(codes[own], blocked, scale, zero_points, offset, dtype, signed), wanted[own])
        for offset, wanted in expected.items()
        for rows in TRIAL_ROWS
        for own in (slice(0, rows), slice(2, 2 + rows))  # begins with an extreme row, or with a large one
    )


def _is_fast(signed: bool, dtype: torch.dtype) -> bool:
    codes, weight, scale, zero_points, _ = _trial(128)
    codes = codes[:4]
    blocked, turned = torch.ops.onednn.qlinear_prepack(weight, None), weight.t()
    fused = _seconds(lambda: _fused(codes, blocked, scale, zero_points, None, dtype, signed))
    return fused < SLOWEST * _seconds(lambda: torch._int_mm(codes, turned))


def _seconds(call: Callable[[], object]) -> float:
    """Least time of a few calls."""
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best
