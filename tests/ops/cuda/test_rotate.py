"""The CUDA rotation: its factor lies where lanes look for it, and it compiles without spills."""

import re

import pytest
import torch

from mergequant.ops import backends
from mergequant.ops.cuda import compiler, rotate
from mergequant.ops.hadamard import sign_factors

WIDTHS = [64, 768, 4096, 11008, 14336]


@pytest.mark.parametrize("width", WIDTHS)
def test_sign_words_when_read_as_a_lane_does_expect_the_outer_factor(width: int) -> None:
    outer = sign_factors(width, 64)[0].t()
    words = rotate.sign_words(width)
    lines = width // 64
    read = torch.zeros(16 * len(words), 64 * words.shape[1])
    lane = torch.arange(32)
    g, t = lane // 4, lane % 4
    for warp in range(words.shape[0]):
        for step in range(4 * words.shape[1]):
            for i in range(4):
                shifted = words[warp, step // 4].long() << (15 - step % 4 * 4 - i)
                for high in (0, 1):
                    sign = 1 - 2 * (shifted >> (15 + 16 * high) & 1)
                    read[16 * warp + g + 8 * (i % 2), 16 * step + 2 * t + 8 * (i // 2) + high] = sign.float()
    assert torch.equal(read[:lines, :lines], outer.float())


def test_reason_when_a_row_does_not_fit_expect_it_named() -> None:
    assert rotate.reason_against(11008, torch.bfloat16) is None
    assert "not torch.float32" in str(rotate.reason_against(4096, torch.float32))
    assert "gathers" in str(rotate.reason_against(4096, torch.float16, gathers=True))
    for width in (40, 176, 28672, 64 * 515):  # no factor of 64, none of signs, too many lines
        assert f"width {width}" in str(rotate.reason_against(width, torch.bfloat16))


@pytest.mark.skipif(compiler.unavailable() is not None, reason=str(compiler.unavailable()))
@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("width", [512, 4096, 11008, 14336, 16384])
def test_kernel_when_compiled_expect_no_spills_and_a_block_s_registers(width: int, target: str) -> None:
    kinds = [(True, False, 1), (False, False, 2), (True, True, 0)]
    for gated, dynamic, vectors in kinds:
        dtype = torch.float16 if gated and dynamic else torch.bfloat16
        unit = rotate.rotate_unit(
            width, dtype, 8, gated=gated, dynamic=dynamic, multiplier=vectors, shift=vectors if vectors == 2 else 0
        )
        result = compiler.compile_unit(unit, target)
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", result.log)
        registers = re.search(r"Used (\d+) registers", result.log)
        assert spills, result.log
        assert sum(map(int, spills)) == 0, f"{unit}: {result.log}"
        blocks, warps = int(dict(unit.defines)["MQ_BLOCKS"]), rotate.warps(width // 64)
        of_a_quarter = -(-blocks * warps // 4)  # warps that share the registers of one of four schedulers
        assert registers, result.log
        assert int(registers[1]) * 32 * of_a_quarter <= 65536 // 4
        assert result.ptx.count("ldmatrix.sync") == 4 * warps
        assert result.ptx.count("mma.sync") == 8 * warps


@pytest.mark.skipif(compiler.unavailable() is not None, reason=str(compiler.unavailable()))
def test_kernel_with_two_blocks_side_by_side_expect_no_spills() -> None:
    unit = rotate.rotate_unit(11008, torch.bfloat16, 4, gated=True, dynamic=False, multiplier=1, blocks=2)
    log = compiler.compile_unit(unit, "sm_90a").log
    assert "0 bytes spill stores, 0 bytes spill loads" in log
    registers = re.search(r"Used (\d+) registers", log)
    assert registers
    assert int(registers[1]) * 32 * 6 <= 65536 // 4


def test_backends_expect_cuda_first_and_composition_for_products() -> None:
    assert backends.BACKENDS["hadamard_quant"] == ("cuda", "triton", "torch")
    assert backends.BACKENDS["silu_mul_hadamard_quant"] == ("cuda", "torch")


def test_kernel_pays_where_it_was_measured_to() -> None:
    assert rotate.pays(11008, 2048, gated=False, dynamic=False)
    assert not rotate.pays(11008, 1, gated=False, dynamic=False)
    assert rotate.pays(11008, 1, gated=False, dynamic=True)
    assert not rotate.pays(4096, 16384, gated=False, dynamic=False)
    assert rotate.pays(4096, 2048, gated=True, dynamic=False)
