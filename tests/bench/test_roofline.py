"""Floors against those worked out by hand for an H200: 4.557 TB/s; sustained 700 (bf16), 1320 (fp8), 1560 TOPS."""

import pytest

from mergequant.bench import SHAPES, Ceilings, Rate
from mergequant.bench.roofline import decode_bytes, decode_floor, e2e_floor, gemm_floor, prefill_floor

SHAPE = SHAPES["llama-2-7b"]
RATES = {"bf16": Rate(742, 700), "fp8": Rate(1356, 1320), "int8": Rate(1940, 1560)}
H200 = Ceilings(4.557, {8: 2.3, 45: 3.83}, 1.0, RATES)


@pytest.mark.parametrize(
    ("batch", "context", "bf16", "fp8", "kv16", "kv8", "kv4"),
    [
        (1, 2048, 3.14, 1.71, 1.00, 0.89, 0.83),
        (4, 2048, 3.84, 2.42, 1.71, 1.24, 1.00),
        (16, 2048, 6.67, 5.25, 4.54, 2.65, 1.71),
        (64, 512, 6.67, 5.25, 4.54, 2.65, 1.71),
        (64, 2048, 18.0, 16.6, 15.8, 8.3, 4.54),
    ],
)
def test_decode_floor(batch: int, context: int, bf16: float, fp8: float, kv16: float, kv8: float, kv4: float) -> None:
    def floor(bits: int, kv: int, kind: str) -> float:
        return decode_floor(H200, SHAPE, batch, context, bits, kv, kind)

    assert floor(16, 16, "bf16") == pytest.approx(bf16, rel=0.01)
    assert floor(8, 16, "fp8") == pytest.approx(fp8, rel=0.01)
    for kv, wanted in ((16, kv16), (8, kv8), (4, kv4)):
        assert floor(4, kv, "int8") == pytest.approx(wanted, rel=0.01)


def test_decode_of_many_sequences_is_bound_by_products() -> None:
    batch = 1 << 14
    operations = 2 * batch * 6_476_005_376
    assert decode_floor(H200, SHAPE, batch, 1, 4, 4, "int8") == pytest.approx(operations / 1560e9)


def test_decode_bytes_of_bf16() -> None:
    assert decode_bytes(SHAPE, 1, 2048, 16, 16) == 2 * (6_476_005_376 + 131_072_000) + 1_073_741_824


@pytest.mark.parametrize(("kind", "products"), [("bf16", 37.9), ("fp8", 20.1), ("int8", 17.0)])
def test_prefill_floor(kind: str, products: float) -> None:
    attention = 2 * 2048**2 * 4096 * 32 / 700e9  # 1.57 ms
    assert attention == pytest.approx(1.57, abs=0.01)
    assert prefill_floor(H200, SHAPE, 1, 2048, kind) == pytest.approx(products + attention, rel=0.005)


def test_e2e_floor_sums_prefill_and_growing_steps() -> None:
    found = e2e_floor(H200, SHAPE, 16, 1024, 3, 4, 4, "int8")
    steps = [decode_floor(H200, SHAPE, 16, context, 4, 4, "int8") for context in (1025, 1026)]
    assert found == pytest.approx(prefill_floor(H200, SHAPE, 16, 1024, "int8") + sum(steps))


def test_gemm_floor_is_bytes_at_one_row_and_operations_at_many() -> None:
    outputs, width = 22016, 4096
    one = gemm_floor(H200, 1, outputs, width, (4, 8), 1560)
    assert one == pytest.approx((outputs * width / 2 + width + 2 * outputs) / 4.557e9)
    many = gemm_floor(H200, 8192, outputs, width, (4, 8), 1560)
    assert many == pytest.approx(2 * 8192 * outputs * width / 1560e9)
