"""static_quant, dynamic_quant, rmsnorm_quant and layernorm_quant against float64 references."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mergequant import ops
from mergequant.errors import KernelError
from mergequant.grids import pack_codes

EPS = 1e-5
SHAPES = [(1, 8), (3, 33), (17, 40), (129, 21), (2, 5, 12), (0, 16)]
Op = Callable[..., Tensor]


def static(x: Tensor, multiplier: Tensor, index: Tensor | None, shift: Tensor | None, bits: int) -> Tensor:
    return ops.static_quant(x, multiplier, index, shift, bits)


def rms(x: Tensor, multiplier: Tensor, index: Tensor | None, shift: Tensor | None, bits: int) -> Tensor:
    return ops.rmsnorm_quant(x, multiplier, index, shift, EPS, bits)


def layer(x: Tensor, multiplier: Tensor, index: Tensor | None, shift: Tensor | None, bits: int) -> Tensor:
    return ops.layernorm_quant(x, multiplier, index, shift, EPS, bits)


def unrounded(op: Op, x: Tensor, multiplier: Tensor, index: Tensor | None, shift: Tensor | None) -> Tensor:
    """What the op rounds, in float64, written out a second time."""
    wide = x.double()
    if op is rms:
        wide = wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt()
    if op is layer:
        wide = (wide - wide.mean(-1, keepdim=True)) / (
            (wide**2).mean(-1, keepdim=True) - wide.mean(-1, keepdim=True) ** 2 + EPS
        ).sqrt()
    if index is not None:
        wide = wide[..., index.long()]
    wide = wide * multiplier.double()
    return wide if shift is None else wide + shift.double()


def assert_codes(codes: Tensor, scaled: Tensor, bits: int) -> None:
    """Codes are the rounded, clamped float64 values; where they differ, the value is a tie in float32."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    expected = scaled.round().clamp(low, high)
    assert codes.dtype == torch.int8
    assert codes.shape == scaled.shape
    different = codes.double() != expected
    distance = ((scaled - scaled.floor()) - 0.5).abs()
    assert bool((distance[different] < 1e-4).all())
    assert int(different.sum()) <= 1e-3 * codes.numel() + 1


def draw(shape: tuple[int, ...], bits: int, extras: bool, seed: int = 0) -> tuple[Tensor, Tensor, Any, Any]:
    """Inputs whose codes reach both ends of the grid and beyond."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[-1]
    width = channels + 5 if extras else channels
    x = torch.randn(shape, generator=generator) * 3 + 0.5
    multiplier = (torch.rand(width, generator=generator) + 0.2) * 2 ** (bits - 1) / 2
    if not extras:
        return x, multiplier, None, None
    index = torch.randint(0, channels, (width,), generator=generator, dtype=torch.int32)
    shift = torch.rand(width, generator=generator) - 0.5
    return x, multiplier, index, shift


@pytest.mark.parametrize("op", [static, rms, layer])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("extras", [False, True])
def test_quant_when_any_shape_expect_float64_codes(op: Op, shape: tuple[int, ...], bits: int, extras: bool) -> None:
    x, multiplier, index, shift = draw(shape, bits, extras)
    codes = op(x, multiplier, index, shift, bits)
    assert_codes(codes, unrounded(op, x, multiplier, index, shift), bits)
    if codes.numel() > 2000:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        assert (int(codes.min()), int(codes.max())) == (low, high)
        assert codes.unique().numel() > 0.8 * 2**bits  # spread over the grid, not stuck at its ends
        assert ((codes < high) & (codes > low)).float().mean() > 0.2


@pytest.mark.parametrize("op", [static, rms, layer])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_quant_when_input_is_another_float_expect_codes_of_its_float32_values(op: Op, dtype: torch.dtype) -> None:
    x, multiplier, index, shift = draw((17, 40), 8, True)
    x = x.to(dtype)
    assert torch.equal(op(x, multiplier, index, shift, 8), op(x.float(), multiplier, index, shift, 8))


def test_static_quant_when_ties_expect_even_codes() -> None:
    x = torch.tensor([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 6.5, 7.5, -8.5, -9.5]])
    codes = ops.static_quant(x, torch.ones(1), None, None, 4)
    assert codes.tolist() == [[-2, -2, 0, 0, 2, 2, 6, 7, -8, -8]]


def test_static_quant_when_one_multiplier_expect_same_as_spread_out() -> None:
    x = draw((17, 40), 4, False)[0]
    one = ops.static_quant(x, torch.tensor([1.7]), None, None, 4)
    assert torch.equal(one, ops.static_quant(x, torch.full((40,), 1.7), None, None, 4))


def test_static_quant_when_copies_are_staggered_expect_sum_of_a_finer_rounding() -> None:
    copies = 5
    x = torch.randn(999, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * 2
    offsets = (torch.arange(copies) + 0.5) / copies - 0.5
    index = torch.zeros(copies, dtype=torch.int32)
    codes = ops.static_quant(x, torch.ones(copies), index, offsets, 8)
    assert torch.equal(codes.sum(1).double(), (copies * x[:, 0]).double().round())
    assert codes.unique().numel() > 8


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("clip_ratio", [1.0, 0.6])
@pytest.mark.parametrize("shape", SHAPES)
def test_dynamic_quant_when_any_shape_expect_float64_scales_and_codes(
    bits: int, clip_ratio: float, shape: tuple[int, ...]
) -> None:
    x = draw(shape, bits, False)[0] * torch.logspace(-8, 8, shape[-2], dtype=torch.float32)[:, None]
    codes, scale = ops.dynamic_quant(x, clip_ratio, bits)
    high = 2 ** (bits - 1) - 1
    expected = x.double().abs().amax(-1, keepdim=True) * clip_ratio / high
    assert scale.dtype == torch.float32
    assert scale.shape == (*shape[:-1], 1)
    torch.testing.assert_close(scale.double(), expected, rtol=1e-6, atol=0)
    assert_codes(codes, x.double() / scale.double(), bits)
    if codes.numel():
        assert bool((codes.float().abs().amax(-1) >= high).all())
        assert codes.unique().numel() > min(2**bits, codes.numel()) / 4


def test_dynamic_quant_when_token_is_zero_expect_zero_codes_and_positive_scale() -> None:
    codes, scale = ops.dynamic_quant(torch.zeros(2, 8), 1.0, 4)
    assert not codes.any()
    assert bool((scale > 0).all())
    assert bool(torch.isfinite(scale).all())


@pytest.mark.parametrize("op", [static, rms, layer])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("extras", [False, True])
def test_quant_when_packed_expect_bytes_of_the_packing_module(op: Op, bits: int, extras: bool) -> None:
    x, multiplier, index, shift = draw((17, 40 if not extras else 41), bits, extras)
    name = {static: "static_quant", rms: "rmsnorm_quant", layer: "layernorm_quant"}[op]
    eps = () if op is static else (EPS,)
    packed = getattr(ops, name)(x, multiplier, index, shift, *eps, bits, packed=True)
    assert packed.dtype == torch.uint8
    assert torch.equal(packed, pack_codes(op(x, multiplier, index, shift, bits), 4))


def test_dynamic_quant_when_packed_expect_bytes_of_the_packing_module() -> None:
    x = draw((17, 40), 4, False)[0]
    packed, scale = ops.dynamic_quant(x, 0.9, 4, packed=True)
    codes, expected = ops.dynamic_quant(x, 0.9, 4)
    assert torch.equal(packed, pack_codes(codes, 4))
    assert torch.equal(scale, expected)


def test_quant_when_codes_cannot_be_packed_expect_error() -> None:
    for width, bits, words in ((7, 4, "even width"), (8, 5, "do not fit")):
        with pytest.raises(KernelError, match=words):
            ops.static_quant(torch.ones(2, width), torch.ones(1), None, None, bits, packed=True)
        with pytest.raises(KernelError, match=words):
            ops.dynamic_quant(torch.ones(2, width), 1.0, bits, packed=True)


WRONG: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("x", "x", lambda x: x.int()),
    ("x", "x", lambda x: torch.tensor(1.0)),
    ("multiplier", "multiplier", lambda m: m.half()),
    ("multiplier", "multiplier", lambda m: m.double()),
    ("multiplier", "multiplier", lambda m: m[:3]),
    ("multiplier", "multiplier", lambda m: m[None]),
    ("index", "index", lambda i: i.float()),
    ("index", "index", lambda i: i[None].repeat(len(i), 1)),
    ("shift", "shift", lambda s: s.bfloat16()),
    ("shift", "shift", lambda s: s[:-1]),
    ("bits", "bits", lambda b: 9),
    ("bits", "bits", lambda b: 1),
    ("multiplier", "multiplier", lambda m: m.to("meta")),
    ("shift", "shift", lambda s: s.to("meta")),
    ("index", "index", lambda i: i.to("meta")),
]


@pytest.mark.parametrize("op", [static, rms, layer])
@pytest.mark.parametrize("case", range(len(WRONG)))
def test_quant_when_an_argument_is_wrong_expect_error_that_names_it(op: Op, case: int) -> None:
    name, word, spoil = WRONG[case]
    x, multiplier, index, shift = draw((3, 12), 4, True)
    values: dict[str, Any] = {"x": x, "multiplier": multiplier, "index": index, "shift": shift, "bits": 4}
    op(**values)
    values[name] = spoil(values[name])
    if any(isinstance(value, Tensor) and value.is_meta for value in values.values()):
        # A tensor on the meta device sends the whole call to the fake version, so the check itself is asked.
        from mergequant.ops._validate import require_quant_arguments

        with pytest.raises(KernelError, match=f"{word} is on meta"):
            require_quant_arguments("op", **values)
        return
    with pytest.raises(KernelError, match=word):
        op(**values)


@pytest.mark.parametrize(
    ("clip_ratio", "bits", "word"), [(0.0, 4, "clip_ratio"), (1.1, 4, "clip_ratio"), (1.0, 9, "bits")]
)
def test_dynamic_quant_when_a_number_is_wrong_expect_error_that_names_it(
    clip_ratio: float, bits: int, word: str
) -> None:
    with pytest.raises(KernelError, match=word):
        ops.dynamic_quant(torch.ones(2, 4), clip_ratio, bits)
    with pytest.raises(KernelError, match="x is"):
        ops.dynamic_quant(torch.ones(2, 4, dtype=torch.int8), 1.0, 4)


@pytest.mark.parametrize("extras", [False, True])
def test_quant_when_run_on_fake_tensors_expect_real_shapes_and_dtypes(extras: bool) -> None:
    x, multiplier, index, shift = draw((2, 5, 12), 4, extras)
    x = x.bfloat16()
    cases: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.static_quant, (x, multiplier, index, shift, 4)),
        (ops.rmsnorm_quant, (x, multiplier, index, shift, EPS, 4)),
        (ops.layernorm_quant, (x, multiplier, index, shift, EPS, 4)),
        (ops.dynamic_quant, (x, 0.9, 4)),
        (ops.static_quant, (x, torch.ones(1), None, None, 4, True)),
        (ops.dynamic_quant, (x, 0.9, 4, True)),
        (ops.hadamard_transform, (x,)),
    ]
    for op, values in cases:
        real = op(*values)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(value) if isinstance(value, Tensor) else value for value in values))
        reals, fakes = (real, fake) if isinstance(real, tuple) else ((real,), (fake,))
        assert [(t.shape, t.dtype, t.stride()) for t in fakes] == [(t.shape, t.dtype, t.stride()) for t in reals]
        torch.library.opcheck(op.overload, values)
