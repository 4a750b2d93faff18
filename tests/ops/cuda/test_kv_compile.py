"""The cache kernels compile for sm_90a without spills and with their instructions; how attention is divided."""

import re

import pytest
import torch

from mergequant.ops.cuda import compiler, kv, kv_pages

pytestmark = pytest.mark.skipif(compiler.unavailable() is not None, reason=str(compiler.unavailable()))
TARGET = "sm_90a"
VARIANTS = [  # width, group, bits, prefix, warps
    (128, 1, 4, False, 4),
    (128, 1, 4, True, 2),
    (128, 4, 4, True, 4),
    (128, 8, 4, True, 4),
    (128, 8, 8, True, 4),
    (128, 1, 8, False, 8),
    (64, 2, 4, True, 4),
    (64, 8, 8, True, 4),
]


def report(log: str) -> dict[str, int]:
    """Figures of the assembler's report."""
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    registers = re.search(r"Used (\d+) registers", log)
    assert spills, log
    assert registers, log
    return {"spilled": sum(map(int, spills)), "registers": int(registers[1])}


@pytest.mark.parametrize(("width", "group", "bits", "prefix", "warps"), VARIANTS)
def test_attention_when_compiled_expect_tensor_core_and_no_spills(
    width: int, group: int, bits: int, prefix: bool, warps: int
) -> None:
    resident = kv.FEW_WARPS if warps == 8 else kv.resident_warps(width, group, bits, prefix)
    unit = kv.attention_unit(width, group, bits, torch.bfloat16, prefix, warps, resident)
    compiled = compiler.compile_unit(unit, TARGET)
    figures = report(compiled.log)
    assert figures["spilled"] == 0, compiled.log
    assert figures["registers"] * warps * 32 * max(1, resident // warps) <= 65536
    chunk = kv.chunk_slots(width, bits)
    assert compiled.ptx.count("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32") == chunk // 8 * (width // 32)
    assert compiled.ptx.count("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32") == chunk // 32 * (width // 8)
    assert "griddepcontrol.wait" in compiled.ptx
    assert "ld.shared::cluster" in compiled.ptx


@pytest.mark.parametrize(
    ("width", "group", "bits", "prefix", "warps"), [(128, 8, 4, True, 4), (128, 4, 8, True, 8), (64, 1, 4, False, 2)]
)
def test_attention_over_pages_when_compiled_expect_no_spills(
    width: int, group: int, bits: int, prefix: bool, warps: int
) -> None:
    unit = kv.attention_unit(width, group, bits, torch.bfloat16, prefix, warps, kv.FEW_WARPS, paged=True)
    figures = report(compiler.compile_unit(unit, TARGET).log)
    assert figures["spilled"] == 0
    assert figures["registers"] * 32 * kv.FEW_WARPS <= 65536


@pytest.mark.parametrize("target", ["sm_80", TARGET])
@pytest.mark.parametrize(("bits", "tokens"), [(4, kv_pages.FEW_TOKENS), (8, kv_pages.MANY_TOKENS)])
def test_store_when_compiled_expect_no_spills_and_no_fused_products(bits: int, tokens: int, target: str) -> None:
    compiled = compiler.compile_unit(kv_pages.store_unit(128, bits, torch.bfloat16, True, tokens), target)
    assert report(compiled.log)["spilled"] == 0
    assert "fma.rn.f32" not in compiled.ptx, "a fused multiply-add rounds otherwise than the reference"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize(("width", "group", "one"), [(128, 1, True), (128, 4, False), (64, 8, False)])
def test_append_when_compiled_expect_no_spills_and_no_fused_products(
    width: int, group: int, one: bool, bits: int, dtype: torch.dtype
) -> None:
    compiled = compiler.compile_unit(kv.append_unit(width, group, bits, dtype, one), TARGET)
    assert report(compiled.log)["spilled"] == 0, compiled.log
    assert "fma.rn.f32" not in compiled.ptx, "a fused multiply-add rounds otherwise than the reference"
    assert "mul.rn.f32" in compiled.ptx


@pytest.mark.parametrize("pairs", [1, 8, 32, 512, 2048])
@pytest.mark.parametrize("most", [1, 64, 512, 2048, 131072])
@pytest.mark.parametrize(("width", "bits"), [(64, 4), (128, 4), (128, 8)])
def test_choose_when_sizes_vary_expect_a_known_division_without_idle_splits(
    pairs: int, most: int, width: int, bits: int
) -> None:
    division = kv.choose(pairs, most, width, bits, 132)
    assert division in set(kv.configurations(width, 1, bits, False))
    chunks = -(-most // kv.chunk_slots(width, bits))
    assert division.splits == 1 or (division.splits // 2) * division.warps < chunks
    assert division.splits == 1 or pairs * division.splits <= 4 * 132
