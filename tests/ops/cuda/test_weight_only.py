"""The weight-only kernels without a GPU: the assembler's report, what they refuse, and how columns are divided."""

import re

import pytest
import torch
from torch import Tensor

from mergequant.ops.cuda import codebook_linear, compiler, sparse_dense
from mergequant.ops.cuda.arrange import LARGEST_WIDTH, SHARED, arrange_unit, token_bytes
from mergequant.ops.cuda.codebook_linear import FUSED_TOKENS, Part, cluster_for, plan
from mergequant.ops.cuda.compiler import Unit

needs_nvrtc = pytest.mark.skipif(compiler.unavailable() is not None, reason=str(compiler.unavailable()))
TARGET = "sm_90a"
REGISTERS = 65536
PARTS = {
    "v6k4096": (12, 0, 4096, 6),
    "v4k256": (8, 0, 256, 4),
    "v8k256+256": (8, 8, 512, 8),
    "v8k65536": (16, 0, 65536, 8),
    "v12k4096+16": (12, 4, 4112, 12),
    "v2k16": (4, 0, 16, 2),
}


def part_of(kind: str, tokens: int) -> Part:
    bits, residual_bits, entries, vector = PARTS[kind]
    return Part(4096, bits, residual_bits, 1, entries, vector, tokens)


def compiled(unit: Unit) -> tuple[str, int]:
    """PTX and registers of a unit that does not spill."""
    made = compiler.compile_unit(unit, TARGET)
    assert "0 bytes spill stores, 0 bytes spill loads" in made.log, made.log
    assert "warning" not in made.log, made.log
    found = re.search(r"Used (\d+) registers", made.log)
    assert found
    return made.ptx, -(-int(found[1]) // 8) * 8


@needs_nvrtc
@pytest.mark.parametrize(("group", "kind"), [(16, 2), (8, 2), (128, 1)])
@pytest.mark.parametrize(("tokens", "width"), [(1, 4096), (2, 11008), (8, 11008), (16, 4096)])
def test_sparse_when_compiled_expect_tensor_cores_and_no_spills(tokens: int, width: int, group: int, kind: int) -> None:
    chosen = sparse_dense.choose(tokens, width)
    assert chosen is not None
    assert chosen.tokens == tokens
    ptx, registers = compiled(sparse_dense.unit(chosen, group, kind, 16, True, False))
    assert registers * 32 * chosen.warps * chosen.blocks <= REGISTERS
    assert ptx.count("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32") == 8 * (1 + (tokens > 8))
    assert ptx.count("griddepcontrol.wait") == 1


@needs_nvrtc
@pytest.mark.parametrize(("tokens", "cluster"), [(1, 1), (4, 2), (8, 3)])
@pytest.mark.parametrize("kind", PARTS)
def test_codebook_when_compiled_expect_tensor_cores_and_no_spills(kind: str, tokens: int, cluster: int) -> None:
    part = part_of(kind, tokens)
    fused = tokens <= FUSED_TOKENS
    ptx, registers = compiled(codebook_linear.unit(part, cluster, fused, True, True))
    assert registers * 32 * part.warps <= REGISTERS
    products = part.unit // 16 * part.vector * (1 + (tokens > 4))
    assert ptx.count("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32") == products
    assert ("ld.shared::cluster" in ptx) == (cluster > 1)
    assert "cvt.rn.f16x2.f32" in ptx


@needs_nvrtc
@pytest.mark.parametrize("ordered", [False, True])
def test_arrange_when_compiled_expect_no_spills(ordered: bool) -> None:
    for half in (False, True):
        ptx, registers = compiled(arrange_unit(half, ordered, 4, ordered, 1024))
        assert registers * 1024 <= REGISTERS
        assert "griddepcontrol.wait" in ptx


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
@pytest.mark.parametrize("blocks", [None, 1, 8])
def test_plan_when_any_books_expect_it_to_fit(kind: str, tokens: int, blocks: int | None) -> None:
    part = part_of(kind, tokens)
    found = plan(part, 22016, 4096, 132, blocks)
    assert found.shared <= SHARED
    assert (part.copies == 0) == (kind == "v8k65536")
    assert part.copies & (part.copies - 1) == 0
    assert part.copies * part.room <= 128
    assert found.shared >= part.books + found.slots * part.sums
    assert found.fused == (tokens <= FUSED_TOKENS)
    assert not plan(part, 22016, LARGEST_WIDTH, 132, blocks).fused


@pytest.mark.parametrize("tiles", [1, 15, 43, 128, 230, 344])
@pytest.mark.parametrize("units", [1, 2, 32, 86])
@pytest.mark.parametrize("processors", [16, 78, 132])
def test_cluster_when_any_shape_expect_one_that_can_run(tiles: int, units: int, processors: int) -> None:
    blocks, clusters = cluster_for(tiles, units, 8, processors)
    assert 1 <= blocks <= min(8, units)
    assert 1 <= clusters <= tiles
    assert blocks * clusters <= processors
    assert cluster_for(tiles, units, 8, processors, 2)[0] == 2


@pytest.mark.parametrize("width", [32, 128, 4096, 11008, 28672, LARGEST_WIDTH])
@pytest.mark.parametrize("tokens", [1, 3, 9, 16, 40])
def test_choose_when_any_width_expect_a_launch_that_fits(tokens: int, width: int) -> None:
    chosen = sparse_dense.choose(tokens, width)
    if chosen is None:
        assert token_bytes(width) > SHARED // 4
        return
    assert chosen.fits(width)
    assert chosen.tokens in (1, 2, 4, 8, 16)
    assert chosen.tokens < 2 * tokens


def sparse_parts(width: int = 128, group: int = 16) -> dict[str, Tensor | int | None]:
    scale = torch.zeros(4, width // group)
    rest = {"pointers": None, "columns": None, "bits": 4, "tile": 16}
    return {"x": torch.zeros(1, width).half(), "codes": torch.zeros(4, width // 2), "scale": scale, **rest}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"x": torch.zeros(1, 128)}, "not torch.float32"),
        ({"bits": 3}, "not 3"),
        (sparse_parts(96, 12), "not 12 of 96"),
        (sparse_parts(48, 16), "not 16 of 48"),
        ({"tile": 8}, "not 8"),
        ({"columns": torch.zeros(3)}, "whole columns"),
        (sparse_parts(131072, 128), "131072"),
    ],
)
def test_sparse_reason_when_it_cannot_run_expect_it_named(change: dict[str, object], words: str | None) -> None:
    reason = sparse_dense.reason_against(**{**sparse_parts(), **change})
    assert reason is None if words is None else words in str(reason)


@pytest.mark.parametrize(
    ("shape", "layout", "words"),
    [
        ((1, 16, 4), [64, 4, 0], None),
        ((2, 16, 4), [64, 4, 0], None),
        ((1, 16, 3), [64, 4, 0], "not 3"),
        ((1, 16, 20), [64, 4, 0], "not 20"),
        ((1, 32, 4), [64, 5, 0], "not 5"),
        ((4, 16, 4), [64, 4, 0], "not 16"),
    ],
)
def test_codebook_reason_when_it_cannot_run_expect_it_named(
    shape: tuple[int, ...], layout: list[int], words: str | None
) -> None:
    x = torch.zeros(1, 64).bfloat16()
    reason = codebook_linear.reason_against(x, [torch.zeros(shape)], layout, [])
    assert reason is None if words is None else words in str(reason)
    assert codebook_linear.reason_against(x.float(), [], [], [])
    assert codebook_linear.reason_against(x, [], [], [x])
