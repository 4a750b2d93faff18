"""Weight-only kernels on a GPU: products near those of the decoded weight in float64, and decoding bit for bit."""

from typing import Any

import pytest
import torch
from torch import Tensor

from mergequant import ops
from mergequant.grids import Outliers, SecondLevel, pack_stream
from mergequant.grids.codebook import packed_words, vectors_for
from mergequant.grids.second_level import encode_statistics
from mergequant.ops import backends
from mergequant.ops._weight_only import places_of
from mergequant.ops.backends import use_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
    ),
]
TOKENS = (1, 2, 3, 5, 8, 9, 16, 17, 33)
LAYOUTS = ("levels", "zeros", "scales")
PARTS = {  # width; then columns, groups, vector, bits, residual bits of each part
    "v6k4096": (512, [(512, 1, 6, 12, 0)]),
    "v4k256": (4096, [(4096, 1, 4, 8, 0)]),
    "v8k256+256": (1056, [(1056, 1, 8, 8, 8)]),
    "v8k65536": (256, [(256, 1, 8, 16, 0)]),
    "v12k4096+16": (160, [(160, 1, 12, 12, 4)]),
    "v2k16": (96, [(96, 1, 2, 4, 0)]),
    "groups": (512, [(512, 4, 4, 8, 0)]),
    "outlier columns": (416, [(32, 1, 4, 12, 0), (384, 1, 6, 12, 0)]),
    "three parts": (4096, [(96, 1, 2, 8, 0), (3968, 2, 8, 8, 4), (32, 1, 4, 4, 0)]),
}


def drawing(seed: int) -> dict[str, Any]:
    return {"generator": torch.Generator("cuda").manual_seed(seed), "device": "cuda"}


def sparse_parts(outputs: int, width: int, group: int, layout: str, ordered: bool, share: float) -> list[Any]:
    """Codes, scale, zero, statistics, order, pointers, columns, values."""
    draw = drawing(outputs + width)
    codes = torch.randint(0, 16, (outputs, width), dtype=torch.int32, **draw)
    shape = (outputs, width // group)
    scale, zero = 0.01 + 0.02 * torch.rand(shape, **draw), 6 * torch.rand(shape, **draw) - 3
    parts: list[Tensor | None] = [scale.half(), zero.half() if layout == "zeros" else None, None]
    if layout == "levels":
        coded = [encode_statistics(part, SecondLevel(16, 3)) for part in (scale, zero)]
        parts = [coded[0][0] | coded[1][0] << 4, None, torch.cat([coded[0][1], coded[1][1]], -1).contiguous()]
    order = torch.randperm(width, **draw).to(torch.int16) if ordered else None
    sparse: list[Tensor | None] = [None, None, None]
    if share:
        mask = torch.rand((outputs, width), **draw) < share
        mask[outputs // 2] = False
        mask[-1, : width // 2] = True  # a row with many more than the others
        store = Outliers.single(torch.randn((outputs, width), **draw), mask)
        sparse = [store.pointers, store.columns, store.values]
    return [pack_stream(codes, 4), *parts, order, *sparse]


def book_parts(kind: str, outputs: int, ordered: bool) -> tuple[list[Tensor], list[Tensor], list[int], Tensor | None]:
    width, parts = PARTS[kind]
    draw = drawing(outputs + width)
    indices, books, layout = [], [], []
    for columns, groups, vector, bits, residual_bits in parts:
        words = packed_words(vectors_for(outputs, vector) * columns, bits + residual_bits)
        drawn = torch.randint(-(1 << 31), 1 << 31, (words,), dtype=torch.int64, **draw)
        indices.append(drawn.to(torch.int32))
        entries = (1 << bits) + (1 << residual_bits if residual_bits else 0)
        books.append(torch.randn((groups, entries, vector), **draw).half())
        layout += [columns, bits, residual_bits]
    return indices, books, layout, torch.randperm(width, **draw).to(torch.int16) if ordered else None


def close(found: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Within what float16 weights and a result of 16 bits may differ from the exact product, and nothing left out."""
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    bound = (x.double().abs() @ weight.double().abs().t()) * 2.0**-9 + exact.abs() * 2.0**-7
    error = (found.double() - exact).abs()
    whole = float((found.double() - exact).norm() / exact.norm())
    return bool((error <= bound).all()) and whole < 6e-3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("outputs", "width", "group"),
    [(16, 32, 16), (40, 96, 8), (23, 128, 16), (4096, 1056, 32), (257, 4096, 16), (100, 11008, 128), (64, 512, 512)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sparse_when_any_layout_expect_the_product(
    outputs: int, width: int, group: int, layout: str, dtype: torch.dtype
) -> None:
    from mergequant.ops.cuda import sparse_dense

    failures = []
    for ordered, share in ((True, 0.01), (False, 0.0), (False, 0.05)):
        parts = sparse_parts(outputs, width, group, layout, ordered, share)
        weight = ops.decode_sparse(*parts, 4, 16, width)
        for tokens in TOKENS:
            x = torch.randn((tokens, width), **drawing(tokens)).to(dtype) * 10.0 ** (tokens % 4 - 2)
            bias = torch.randn(outputs, **drawing(1)) if tokens % 2 else None
            torch.full((tokens, outputs), torch.nan, dtype=dtype, device="cuda")  # what the result is likely to lie on
            found = sparse_dense.linear(x, *parts, bias, 16)
            if not close(found, x, weight, bias):
                failures.append((ordered, share, tokens))
            assert torch.equal(found, sparse_dense.linear(x, *parts, bias, 16))
    assert not failures


@pytest.mark.parametrize(("warps", "blocks"), [(4, 4), (8, 2), (8, 3), (16, 1)])
def test_sparse_when_any_configuration_expect_the_product(warps: int, blocks: int) -> None:
    from mergequant.ops.cuda import sparse_dense

    parts = sparse_parts(5000, 1408, 16, "levels", True, 0.02)
    weight = ops.decode_sparse(*parts, 4, 16, 1408)
    for tokens in (1, 4, 16):
        x = torch.randn((tokens, 1408), **drawing(tokens)).bfloat16()
        own = sparse_dense.Configuration(tokens, warps, blocks)
        assert close(sparse_dense.linear(x, *parts, None, 16, configuration=own), x, weight, None)


@pytest.mark.parametrize("outputs", [8, 100, 4099])
@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codebook_when_any_layout_expect_the_product(kind: str, outputs: int, dtype: torch.dtype) -> None:
    from mergequant.ops.cuda import codebook_linear

    failures = []
    for ordered, cluster in ((True, None), (False, 2), (True, 3)):
        parts = book_parts(kind, outputs, ordered)
        weight = ops.codebook_weight(*parts, [], outputs)
        if cluster is not None and min(parts[2][::3]) <= 128 * (cluster - 1):
            continue
        for tokens in TOKENS:
            x = torch.randn((tokens, sum(parts[2][::3])), **drawing(tokens)).to(dtype) * 10.0 ** (tokens % 4 - 2)
            bias = torch.randn(outputs, **drawing(1)).to(dtype) if tokens % 2 else None
            torch.full((tokens, outputs), torch.nan, dtype=dtype, device="cuda")
            found = codebook_linear.linear(x, *parts, bias, outputs, cluster=cluster)
            if not close(found, x, weight, bias):
                failures.append((ordered, cluster, tokens))
            assert torch.equal(found, codebook_linear.linear(x, *parts, bias, outputs, cluster=cluster))
    assert not failures


@pytest.mark.parametrize("largest", [0.0, 1e-30, 3e4, 1e30])
def test_inputs_when_tiny_or_huge_expect_no_overflow(largest: float) -> None:
    parts = sparse_parts(48, 256, 16, "zeros", True, 0.02)
    x = torch.randn((3, 256), **drawing(0)).bfloat16()
    x[1] *= largest
    found = ops.sparse_dense_linear(x, *parts, None, 4, 16)
    weight = ops.decode_sparse(*parts, 4, 16, 256)
    for token in range(3):
        row = found[token : token + 1]
        assert torch.isfinite(row).all()
        assert close(row, x[token : token + 1], weight, None) or (token == 1 and not largest and not row.any())


def test_ops_when_captured_expect_the_replayed_product() -> None:
    sparse, books = sparse_parts(512, 1024, 16, "levels", True, 0.01), book_parts("v4k256", 512, True)
    for tokens in (1, 16):
        x, wide = (torch.zeros((tokens, width), dtype=torch.bfloat16, device="cuda") for width in (1024, 4096))
        ops.sparse_dense_linear(x, *sparse, None, 4, 16), ops.codebook_linear(wide, *books, [], None, 512)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first = ops.sparse_dense_linear(x, *sparse, None, 4, 16)
            second = ops.codebook_linear(wide, *books, [], None, 512)
        x.copy_(torch.randn(x.shape, **drawing(1)))
        wide.copy_(torch.randn(wide.shape, **drawing(2)))
        graph.replay()
        assert torch.equal(first, ops.sparse_dense_linear(x, *sparse, None, 4, 16))
        assert torch.equal(second, ops.codebook_linear(wide, *books, [], None, 512))
        assert float(first.float().std()) > 0.1
        assert float(second.float().std()) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decode_when_compiled_expect_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    from mergequant.ops.triton import codebook_linear, sparse_dense

    for layout in LAYOUTS:
        for ordered in (False, True):
            parts = sparse_parts(300, 1056, 16, layout, ordered, 0.02)
            places = places_of(parts[4]) if ordered else None
            found = sparse_dense.decode(*parts[:4], places, *parts[5:], 4, 16, 1056, dtype)
            expected = ops.decode_sparse(*parts, 4, 16, 1056).to(dtype)
            assert torch.equal(found, expected[:, parts[4].long()] if ordered else expected)
    for kind in PARTS:
        stored = book_parts(kind, 100, False)
        expected = ops.codebook_weight(*stored, [], 100).to(dtype)
        assert torch.equal(codebook_linear.decode(*stored[:3], 100, dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_ops_when_tokens_grow_expect_the_product_of_every_way(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_reported", {})
    sparse, books = sparse_parts(300, 1024, 16, "levels", True, 0.01), book_parts("outlier columns", 300, True)
    bias = torch.randn(300, **drawing(3)).to(dtype)
    weights = ops.decode_sparse(*sparse, 4, 16, 1024), ops.codebook_weight(*books, [], 300)
    for tokens in (1, 2, 16, 300):
        x, narrow = (torch.randn((tokens, width), **drawing(tokens)).to(dtype) for width in (1024, 416))
        with use_backend(backend):
            assert close(ops.sparse_dense_linear(x, *sparse, bias, 4, 16), x, weights[0], bias)
            assert close(ops.codebook_linear(narrow, *books, [], bias, 300), narrow, weights[1], bias)
    for op in ("sparse_dense_linear", "codebook_linear"):
        told = backends.reports(op)
        assert any("decoded weight" in report for report in told)
        assert any("not torch.float32" in report for report in told) == (backend == "cuda" and dtype == torch.float32)
