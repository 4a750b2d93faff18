"""The elementwise CUDA kernels compile for every GPU they are meant for, without spills and without fused products."""

import re

import pytest
import torch

from mergequant.ops import backends
from mergequant.ops.cuda import compiler
from mergequant.ops.cuda.compiler import Compiled, Unit
from mergequant.ops.cuda.elementwise import dynamic_unit, gather_unit, norm_unit, static_unit

pytestmark = pytest.mark.skipif(compiler.unavailable() is not None, reason=str(compiler.unavailable()))
TARGETS = ("sm_80", "sm_90a")
B, H, F = torch.bfloat16, torch.float16, torch.float32
FUSED = "fma.rn.f32"
FUSED_OF_AN_EXPONENTIAL = 3  # NVRTC's own expf
GROUP = 8
NORMS = {
    "rmsnorm": norm_unit(B, None, F, 8, channels=4096),
    "layernorm, packed": norm_unit(F, None, F, 4, channels=16384, packed=True, centre=True, shift=2),
    "gathered, one multiplier": norm_unit(H, None, F, 8, channels=1000, gathered=True, multiplier=1, shift=1),
    "gathered, long": norm_unit(F, F, F, 8, channels=16384, gathered=True, centre=True, shift=2, aligned=False),
    "add": norm_unit(B, B, F, 8, channels=4096, shift=2),
    "add, long": norm_unit(B, F, F, 8, channels=20000),
    "add, unaligned": norm_unit(F, F, F, 8, channels=16383, shift=2, aligned=False),
    "floats": norm_unit(H, H, H, 0, channels=8192),
}
GATHERS = {
    "gathered": gather_unit(B, B, F, 8, longest=4416),
    "gathered, all": gather_unit(H, None, F, 4, longest=8192, packed=True, centre=True, shift=2),
}
STATICS = {
    "static": static_unit(B, 8, shift=2),
    "static, packed": static_unit(H, 4, packed=True, gathered=True, shift=2),
    "static, unaligned": static_unit(F, 8, aligned=False),
}
GATED = {
    "floats": static_unit(B, 0, gated=True, multiplier=0),
    "codes": static_unit(H, 8, gated=True, shift=2),
    "gathered": static_unit(F, 8, gated=True, gathered=True),
}


def compiled(unit: Unit, target: str) -> Compiled:
    """The unit's machine code, without spills and with registers for all threads of a block."""
    result = compiler.compile_unit(unit, target)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", result.log)
    registers = re.search(r"Used (\d+) registers", result.log)
    assert spills, result.log
    assert sum(map(int, spills)) == 0, f"{unit}: {result.log}"
    assert registers, result.log
    assert int(registers[1]) * dict(unit.defines)["MQ_THREADS"] <= 65536
    waits = result.ptx.count("griddepcontrol.wait")
    assert waits == (0 if target == "sm_80" else 1)
    return result


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "unit", [*NORMS.values(), *GATHERS.values(), *STATICS.values()], ids=[*NORMS, *GATHERS, *STATICS]
)
def test_kernel_when_compiled_expect_no_spills_and_no_fused_products(unit: Unit, target: str) -> None:
    ptx = compiled(unit, target).ptx
    assert FUSED not in ptx, "a fused multiply-add rounds otherwise than the reference"
    assert "mul.rn.f32" in ptx
    wide = re.search(r"ld\.global(\.nc)?\.v4", ptx)
    assert bool(wide) == bool(dict(unit.defines)["MQ_ALIGNED"])
    if dict(unit.defines)["MQ_BITS"]:
        assert "cvt.rni.s32.f32" in ptx


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("dtype", "bits", "width"), [(B, 8, 4096), (F, 8, 16384), (H, 4, 20000)])
def test_dynamic_when_compiled_expect_no_fused_products_but_the_quotients_two(
    dtype: torch.dtype, bits: int, width: int, gated: bool, target: str
) -> None:
    unit = dynamic_unit(dtype, bits, width=width, gated=gated, packed=bits == 4 and not gated)
    ptx = compiled(unit, target).ptx
    held = dict(unit.defines)["MQ_HELD"]
    quotients = GROUP * max(held, 1)
    exponentials = GROUP * (held or 2) if gated else 0  # rows that are not held are gated twice
    assert ptx.count(FUSED) == 2 * quotients + FUSED_OF_AN_EXPONENTIAL * exponentials


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("unit", GATED.values(), ids=GATED)
def test_gated_when_compiled_expect_fused_products_in_exponentials_only(unit: Unit, target: str) -> None:
    assert compiled(unit, target).ptx.count(FUSED) == GROUP * FUSED_OF_AN_EXPONENTIAL


@pytest.mark.parametrize("target", backends.CUDA_ARCHITECTURES["rmsnorm_quant"])
def test_kernel_when_compiled_for_any_listed_architecture_expect_code(target: str) -> None:
    if compiler.compiler_version() != "13.0" and int(target.removeprefix("sm_")) > 90:
        pytest.skip("the list is that of NVRTC 13.0")
    for unit in (NORMS["add"], STATICS["static"], dynamic_unit(B, 8, width=4096)):
        assert compiler.compile_unit(unit, target).cubin
