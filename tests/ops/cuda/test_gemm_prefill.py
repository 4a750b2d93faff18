"""The prefill GEMM without a GPU: what the assembler makes of it."""

import shutil
import subprocess
from pathlib import Path

import pytest

from mergequant.errors import KernelError
from mergequant.ops.cuda import compiler, gemm_prefill, wgmma
from mergequant.ops.cuda.compiler import compile_unit
from mergequant.ops.cuda.gemm_prefill import Plan, shared_bytes, unit
from mergequant.ops.cuda.prefill_plan import TILES

needs_nvrtc = pytest.mark.skipif(compiler.unavailable() is not None, reason=str(compiler.unavailable()))


def disassembly(cubin: bytes, folder: Path) -> str:
    """Machine code as text, by the disassembler of a toolkit or of the Triton wheel; skips without either."""
    tool = shutil.which("nvdisasm")
    if tool is None:
        triton = pytest.importorskip("triton", reason="neither nvdisasm nor Triton's copy of it")
        tool = str(Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm")
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    return subprocess.run([tool, "-c", str(path)], capture_output=True, text=True, check=True).stdout


@needs_nvrtc
@pytest.mark.parametrize(
    ("tile", "weight_bits", "epilogue"),
    [((256, 128), 4, 0), ((128, 256), 4, 2), ((96, 256), 8, 1), ((64, 128), 8, 2), ((192, 128), 4, 1)],
)
def test_compile_when_registers_are_tight_expect_no_spill_and_no_serialized_wgmma(
    tile, weight_bits, epilogue, tmp_path
) -> None:
    compiled = compile_unit(unit(Plan(*tile, 1, 1), weight_bits, epilogue), "sm_90a")
    assert "0 bytes spill stores, 0 bytes spill loads" in compiled.log
    assert "C75" not in compiled.log, compiled.log  # the assembler's "wgmma serialized" lines are not even warnings
    assert f"wgmma.mma_async.sync.aligned.m64n{tile[0]}k32.s32.s8.s8" in compiled.ptx
    lines = disassembly(compiled.cubin, tmp_path).splitlines()
    multiplies = [line for line in lines if f"IGMMA.64x{tile[0]}x32.S8.S8" in line]
    assert len(multiplies) == 4 * tile[1] // 128, "four k-steps of each group, once: the loop is not unrolled or peeled"
    assert all(" R" in line.split("S8.S8")[1].split("gdesc")[0] for line in multiplies), "weights come from registers"


@needs_nvrtc
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_compile_when_codes_are_clamped_expect_the_bounds_of_the_grid(bits) -> None:
    compiled = compile_unit(unit(Plan(64, 128, 1, 1), 4, gemm_prefill.SWIGLU, bits), "sm_90a")
    assert f", {-(1 << (bits - 1))};" in compiled.ptx
    assert f", {(1 << (bits - 1)) - 1};" in compiled.ptx


@pytest.mark.parametrize("n", [0, 7, 40, 264])
def test_wgmma_header_when_the_width_does_not_exist_expect_an_error(n) -> None:
    with pytest.raises(KernelError, match=f"no width {n}"):
        wgmma.header(n)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("epilogue", [0, 2])
def test_shared_memory_when_any_tile_is_taken_expect_it_to_fit_with_three_stages(tile, weight_bits, epilogue) -> None:
    plan = Plan(*tile, 1, 1)
    assert shared_bytes(plan, weight_bits, epilogue) <= 227 * 1024
    assert dict(unit(plan, weight_bits, epilogue).defines)["MQ_STAGES"] >= 3
