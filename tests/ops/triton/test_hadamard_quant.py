"""The fused rotation in the interpreter, against float64, for every way that a width can be cut."""

import pytest
import torch

from elementwise_cases import CLIP, assert_near_exact, draw, run
from mergequant import ops
from mergequant.errors import KernelError
from mergequant.ops import backends
from mergequant.ops.backends import use_backend
from mergequant.ops.triton import hadamard_quant as kernels

# The interpreter cuts off where a GPU rounds: the two bfloat16 parts hold 15 bits, not 16.
SHARE = 5e-3
NEAR = 2e-2
PROCESSORS = 132
LARGE = [4096, 5120, 8192, 11008, 12288, 13824, 14336, 18944, 28672]


@pytest.mark.parametrize("channels", [1, 40, 64, 512, 704, 1376])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_static_when_interpreted_expect_float64_codes(channels: int, dtype: torch.dtype) -> None:
    for case in (draw(3, channels, 8, dtype, shifted=True), draw(3, channels, 4, dtype, one=True)):
        with use_backend("triton"):
            assert_near_exact("hadamard_quant", case, *run("hadamard_quant", case), SHARE, NEAR)


def test_static_when_gathered_expect_float64_codes() -> None:
    case = draw(3, 64, width=80, shifted=True)
    with use_backend("triton"):
        assert_near_exact("hadamard_quant", case, *run("hadamard_quant", case), SHARE, NEAR)


@pytest.mark.parametrize("channels", [40, 64, 704])
@pytest.mark.parametrize("area", [16384, 512])
def test_dynamic_when_interpreted_expect_float64_codes_and_scales(
    channels: int, area: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "SLICE_AREA", area)  # the small one: more than one slice, by way of the scratch
    monkeypatch.setattr(kernels, "SLICE_AREA_VIA_SCRATCH", area)
    monkeypatch.setattr(kernels, "LINES_PER_WARPGROUP", 16)
    monkeypatch.setattr(kernels, "PIECE", 256)
    kernels.plan.cache_clear()
    case = draw(3, channels, dtype=torch.float16)
    with use_backend("triton"):
        codes, scale = run("hadamard_dynamic_quant", case)
    kernels.plan.cache_clear()
    assert_near_exact("hadamard_dynamic_quant", case, codes, SHARE, NEAR)
    largest = ops.hadamard_transform(case.x.double()).abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scale.double(), largest * CLIP / 127, rtol=1e-3, atol=0)


@pytest.mark.parametrize("channels", LARGE)
@pytest.mark.parametrize("rows", [1, 16, 128])
@pytest.mark.parametrize("dynamic", [False, True])
def test_plan_when_width_is_that_of_a_large_model_expect_it_to_fit(channels: int, rows: int, dynamic: bool) -> None:
    cut = kernels.plan(channels, rows, dynamic, PROCESSORS)
    assert cut.a * cut.b == channels
    assert cut.outer >= cut.a
    assert cut.inner >= cut.b
    assert cut.inner % cut.slice == 0
    assert cut.outer * cut.slice <= 128 * 32 * cut.warps  # registers for the sums
    taken = kernels._shared_bytes(cut.a, cut.outer, cut.inner, cut.slice, cut.stages)
    assert taken + kernels.SHARED_RESERVE <= kernels.SHARED_HOPPER
    if not dynamic and rows == 1:
        assert cut.slice == kernels.LEAST_ORDER  # one row is spread over as many programs as there are
    assert kernels.reason_against(channels) is None


def test_plan_when_gpu_has_less_shared_memory_expect_smaller_slices_or_a_reason() -> None:
    ada = 100 * 1024
    cut = kernels.plan(14336, 128, True, 128, ada)
    assert kernels._shared_bytes(cut.a, cut.outer, cut.inner, cut.slice, cut.stages) + kernels.SHARED_RESERVE <= ada
    assert cut.slice < kernels.plan(14336, 128, True, 128).slice
    assert "shared memory" in str(kernels.reason_against(28672, ada))


def test_op_when_width_does_not_suit_expect_torch_and_a_report() -> None:
    assert "cosine-3" in str(kernels.reason_against(6))
    assert "does not fit" in str(kernels.reason_against(2**17))
    with pytest.raises(KernelError, match="does not fit"):
        kernels.plan(2**17, 1, False, PROCESSORS)
    case = draw(3, 6, one=True)
    with use_backend("triton"):
        codes = run("hadamard_quant", case)[0]
    assert torch.equal(codes, run("hadamard_quant", case)[0])
    assert any("cosine-3" in reason for reason in backends.reports("hadamard_quant"))
