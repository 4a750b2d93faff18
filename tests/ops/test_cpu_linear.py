"""prepared_linear: the bits of exact integer sums with a float32 epilogue, whatever this processor multiplies with."""

import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergequant import ops
from mergequant.errors import KernelError

cpu_linear = import_module("mergequant.ops.cpu_linear")
int_matmul = import_module("mergequant.ops.int_matmul")

# Both sides of every limit: 257 outputs, 4096 results, a million elements; odd and empty shapes.
SHAPES = [
    (1, 1, 1),
    (0, 6, 4),
    (3, 0, 4),
    (3, 18, 5),
    (17, 130, 33),
    (1, 576, 256),
    (2, 576, 257),
    (16, 70, 256),
    (17, 70, 256),
    (1, 576, 1408),
    (1, 1030, 1030),
    (3, 4099, 260),
    (1030, 61, 300),
]
SIGNED = cpu_linear.Form(signed=True, dtypes=frozenset(cpu_linear.DTYPES))
SHIFTED = cpu_linear.Form(signed=False, dtypes=frozenset({torch.float32}))
PROCESSORS = ("AVX512_CORE_VNNI", "AVX2_VNNI", "AVX2")  # what oneDNN is held to, where the processor knows more
HERE = Path(__file__).resolve().parent


def full_range(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Codes over the whole grid, whole rows of them extreme."""
    codes = torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    codes[0::5], codes[3::5] = 127, -128
    return codes


def reference(
    codes: Tensor, weight: Tensor, scale: Tensor, token_scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """int64 sums, then float32 operations in the order of the contract."""
    value = (codes.long() @ weight.long().t()).float() * scale
    if token_scale is not None:
        value = value * token_scale
    return (value if bias is None else value + bias).to(dtype)


def check(tokens: int, width: int, outputs: int, dtype: torch.dtype, with_tokens: bool, with_bias: bool) -> None:
    generator = torch.Generator().manual_seed(tokens)
    codes, weight = full_range((tokens, width)), full_range((outputs, width), 1)
    scale = torch.rand(outputs, generator=generator) + 0.01
    token_scale = torch.rand(tokens, 1, generator=generator) + 0.1 if with_tokens else None
    bias = 1000 * torch.randn(outputs, generator=generator) if with_bias else None
    expected = reference(codes, weight, scale, token_scale, bias, dtype)
    result = ops.prepared_linear(codes, ops.prepare_weight(weight), scale, token_scale, bias, dtype)
    assert result.dtype == dtype
    assert torch.equal(result, expected)
    assert torch.equal(ops.int8_linear(codes, weight, scale, token_scale, bias, dtype), expected)


@pytest.mark.parametrize(("tokens", "width", "outputs"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("extras", range(4))
def test_prepared_linear_when_shapes_are_awkward_expect_the_bits_of_exact_sums(
    tokens: int, width: int, outputs: int, dtype: torch.dtype, extras: int
) -> None:
    check(tokens, width, outputs, dtype, bool(extras & 1), bool(extras & 2))


@pytest.mark.parametrize("form", [None, SIGNED, SHIFTED])
@pytest.mark.parametrize(("tokens", "width", "outputs"), [(1, 576, 256), (3, 61, 300), (40, 1030, 1030)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prepared_linear_when_another_form_is_chosen_expect_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
    form: Any,
    tokens: int,
    width: int,
    outputs: int,
    dtype: torch.dtype,
) -> None:
    if form is not None and torch.float32 not in {
        kind for kind in form.dtypes if cpu_linear._passes(form.signed, kind)
    }:
        pytest.skip("this processor does not compute this form exactly and fast")
    monkeypatch.setattr(cpu_linear, "_form", lambda: form)
    check(tokens, width, outputs, dtype, with_tokens=False, with_bias=True)
    prepared = ops.prepare_weight(full_range((outputs, width)))
    assert (prepared.fused is None) == (form is None or (form is SHIFTED and outputs * width < 1_000_000))
    assert (prepared.plain is None) == (prepared.fused is not None and outputs > 256)


@pytest.mark.parametrize("processor", PROCESSORS)
def test_prepared_linear_when_the_processor_knows_less_expect_the_same_bits(processor: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {Path(__file__).stem} as test; test.on_this_processor()"],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": processor, "PYTHONPATH": os.pathsep.join([*sys.path, str(HERE)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def on_this_processor() -> None:
    """Runs in a process of its own: oneDNN reads what it may use once."""
    torch.set_num_threads(1)
    for tokens, width, outputs in ((1, 63, 5), (1, 576, 1408), (5, 576, 300), (40, 1030, 1030)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            check(tokens, width, outputs, dtype, with_tokens=False, with_bias=True)


def test_trial_when_a_result_is_wrong_by_one_bit_expect_the_form_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = cpu_linear._fused

    def wrong(*arguments: Any) -> Tensor:
        value = fused(*arguments)
        value[-1, -1] *= 1 + 2**-7  # one unit of a bfloat16
        return value

    monkeypatch.setattr(cpu_linear, "_fused", wrong)
    assert cpu_linear._form.__wrapped__() is None


def test_trial_when_sums_saturate_in_16_bits_expect_the_form_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(codes: Tensor, blocked: Tensor, scale: Tensor, *rest: Any) -> Tensor:
        products = codes.int()[:, None] * blocked.to_dense().int()[None]
        pairs = products[..., 0 : products.shape[-1] // 2 * 2].unflatten(-1, (-1, 2)).sum(-1).clamp(-32768, 32767)
        sums = pairs.sum(-1) + (products[..., -1] if products.shape[-1] % 2 else 0)
        value = sums.float() * scale
        bias, dtype = rest[1], rest[2]
        return (value if bias is None else value + bias).to(dtype)

    monkeypatch.setattr(cpu_linear, "_fused", saturating)
    monkeypatch.setattr(cpu_linear, "_is_fast", lambda *_: True)
    monkeypatch.setattr(cpu_linear, "TRIAL_WIDTHS", (64,))  # the emulation is slow
    assert cpu_linear._form.__wrapped__() is None


def test_trial_when_the_form_runs_on_a_reference_path_expect_it_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = cpu_linear._fused

    def slow(*arguments: Any) -> Tensor:
        time.sleep(0.02)
        return fused(*arguments)

    monkeypatch.setattr(cpu_linear, "_fused", slow)
    assert not cpu_linear._passes(True, torch.float32)


def test_cpu_backend_when_nothing_is_exact_expect_it_to_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "_form", lambda: None)
    monkeypatch.setattr(int_matmul, "_cpu_product_is_exact", lambda: False)
    assert "saturates" in ops.cpu_backend()
    check(3, 130, 33, torch.float32, with_tokens=True, with_bias=True)
    monkeypatch.setattr(cpu_linear, "_form", lambda: SHIFTED)
    assert "uint8" in ops.cpu_backend()


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("outputs", [20, 300])
def test_prepared_linear_when_tokens_have_several_axes_expect_them_kept(leading: tuple[int, ...], outputs: int) -> None:
    codes = full_range((100, 2 * 1040))[: max(1, torch.Size(leading).numel()), ::2].reshape(*leading, 1040)
    weight, scale = full_range((outputs, 1040), 1), torch.rand(outputs) + 0.1
    token_scale, bias = torch.rand(*leading, 1) + 0.1, torch.randn(outputs)
    for own_scale in (None, token_scale):
        result = ops.prepared_linear(codes, ops.prepare_weight(weight), scale, own_scale, bias, torch.bfloat16)
        assert torch.equal(result, reference(codes, weight, scale, own_scale, bias, torch.bfloat16))


WRONG: list[tuple[str, Any]] = [
    ("codes", lambda codes: codes.float()),
    ("codes", lambda codes: codes[:, :-1]),
    ("weight_scale", lambda scale: scale[:-1]),
    ("weight_scale", lambda scale: scale.double()),
    ("token_scale", lambda scale: scale[:2]),
    ("bias", lambda bias: bias[:1]),
    ("out_dtype", lambda dtype: torch.int32),
]


@pytest.mark.parametrize("outputs", [5, 600])
@pytest.mark.parametrize("case", range(len(WRONG)))
def test_prepared_linear_when_an_argument_is_wrong_expect_error_that_names_it(case: int, outputs: int) -> None:
    values = {
        "codes": full_range((30, 600)),
        "weight": ops.prepare_weight(full_range((outputs, 600))),
        "weight_scale": torch.ones(outputs),
        "token_scale": torch.ones(30, 1),
        "bias": torch.zeros(outputs),
        "out_dtype": torch.float32,
    }
    ops.prepared_linear(*values.values())  # right before it is spoilt
    name, spoil = WRONG[case]
    values[name] = spoil(values[name])
    with pytest.raises(KernelError, match=name):
        ops.prepared_linear(*values.values())


@pytest.mark.parametrize("weight", [torch.zeros(3, 4), torch.zeros(4, dtype=torch.int8)])
def test_prepare_weight_when_it_is_no_matrix_of_codes_expect_error(weight: Tensor) -> None:
    with pytest.raises(KernelError, match="weight"):
        ops.prepare_weight(weight)


def test_prepare_weight_when_it_is_not_on_a_cpu_expect_error() -> None:
    with pytest.raises(KernelError, match="meta"):
        ops.prepare_weight(torch.zeros(3, 4, dtype=torch.int8, device="meta"))
