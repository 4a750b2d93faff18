import pytest

from mergequant.bench.ceilings import RATE_OPERATIONS, RATE_SHARED, source
from mergequant.ops.cuda import compiler
from mergequant.ops.cuda.compiler import compile_unit

needs_nvrtc = pytest.mark.skipif(compiler.unavailable() is not None, reason=str(compiler.unavailable()))


@needs_nvrtc
def test_micro_benchmarks_compile_without_spills_or_serialized_products() -> None:
    compiled = compile_unit(source(hopper=True), "sm_90a")
    assert "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8" in compiled.ptx
    assert "C75" not in compiled.log  # ptxas's notes on wgmma that it had to serialize
    lines = [line for line in compiled.log.splitlines() if "spill" in line]
    assert len(lines) == 2
    assert all("0 bytes spill stores, 0 bytes spill loads" in line for line in lines)


@needs_nvrtc
def test_reading_compiles_for_older_architectures() -> None:
    compiled = compile_unit(source(hopper=False), "sm_80")
    assert "read_all" in compiled.ptx
    assert "wgmma" not in compiled.ptx


def test_counts_of_the_wgmma_loop() -> None:
    assert RATE_OPERATIONS == 2 * (2 * 4) * 64 * 256 * 32  # two warpgroups, four steps, multiply and add
    assert RATE_SHARED == 2 * 256 * 128 + 1024
