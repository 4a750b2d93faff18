"""The prefill GEMM on a GPU: bit-equal to the exact product for every plan, awkward shapes, every epilogue."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mergequant.errors import KernelError
from mergequant.ops.cuda import gemm_prefill, launch
from mergequant.ops.cuda.prefill_plan import TILES, Plan, configurations
from mergequant.ops.overlap import overlapping
from mergequant.ops.tiles import tile_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an sm_90 GPU"
    ),
]

ROWS = (1, 3, 17, 129, 300, 2049)
OUTPUTS = (64, 200, 512, 4096)
WIDTHS = (128, 192, 1040, 4096, 11008)
DTYPES = (torch.bfloat16, torch.float16)
POISON = 99


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """All kernels that the tests below use, compiled side by side."""
    some = [Plan(*tile, 1, 1) for tile in TILES]
    units = [gemm_prefill.unit(plan, bits, epilogue) for plan in some for bits in (4, 8) for epilogue in (0, 1, 2)]
    units += [gemm_prefill.unit(plan, 4, gemm_prefill.SWIGLU, 4) for plan in some]
    launch.prepare([(unit, gemm_prefill.KERNEL) for unit in units], torch.device("cuda", torch.cuda.current_device()))


@dataclass
class Problem:
    """Random full-range operands with their exact product, float64 (rows, outputs)."""

    codes: Tensor
    tiles: Tensor
    exact: Tensor
    weight_scale: Tensor
    token_scale: Tensor
    bias: Tensor
    weight_bits: int

    def value(self, scaled: bool, biased: bool) -> Tensor:
        """Float32 result, one rounding per operation."""
        value = self.exact.float() * self.weight_scale
        value = value * self.token_scale[:, None] if scaled else value
        return value + self.bias if biased else value

    def operands(self, scaled: bool, biased: bool) -> tuple[Tensor | int | None, ...]:
        token_scale = self.token_scale if scaled else None
        return self.codes, self.tiles, self.weight_scale, token_scale, self.bias if biased else None, self.weight_bits


def problem(
    rows: int, outputs: int, width: int, weight_bits: int, seed: int = 0, spread: float = 8.0, extreme: bool = True
) -> Problem:
    """`spread`: standard deviation of the float results; `extreme`: the first is the largest sum there is."""
    generator = torch.Generator("cuda").manual_seed(seed + rows * 7 + outputs * 11 + width * 13 + weight_bits)
    high = 1 << (weight_bits - 1)
    draw = {"generator": generator, "device": "cuda"}
    codes = torch.randint(-128, 128, (rows, width), dtype=torch.int8, **draw)
    weight = torch.randint(-high, high, (outputs, width), dtype=torch.int8, **draw)
    if extreme:
        codes[0], weight[0] = -128, -high
    step = spread / (73.9 * high * 0.577 * width**0.5)
    return Problem(
        codes,
        tile_weight(weight, weight_bits),
        codes.double() @ weight.double().t(),
        (torch.rand(outputs, **draw) + 0.5) * step,
        torch.rand(rows, **draw) + 0.5,
        torch.randn(outputs, **draw) * spread / 4,
        weight_bits,
    )


def plans(rows: int, outputs: int, width: int) -> Iterator[Plan]:
    device = torch.device("cuda", torch.cuda.current_device())
    yield from configurations(rows, outputs, width, launch.multiprocessors(device))


def difference(result: Tensor, expected: Tensor, what: str) -> str | None:
    """None if equal; else what a debugger wants to know first."""
    if torch.equal(result, expected):
        return None
    wrong = result.ne(expected)  # a NaN differs from everything
    m, n = (int(i) for i in wrong.nonzero()[0])
    rows, columns = wrong.any(1).nonzero().flatten(), wrong.any(0).nonzero().flatten()
    return (
        f"{what}: {int(wrong.sum())} of {wrong.numel()} wrong, first at ({m}, {n}): {result[m, n].item()} is not "
        f"{expected[m, n].item()}; rows {int(rows[0])}..{int(rows[-1])} ({len(rows)}), columns {int(columns[0])}.."
        f"{int(columns[-1])} ({len(columns)}); untouched {int(result.isnan().sum())}"
    )


@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_linear_when_any_plan_runs_expect_the_exact_product_bit_for_bit(outputs, width, weight_bits) -> None:

    failures, runs = [], 0
    for rows in ROWS:
        case = problem(rows, outputs, width, weight_bits)
        expected = {
            (scaled, biased, dtype): case.value(scaled, biased).to(dtype)
            for scaled, biased, dtype in itertools.product((False, True), (False, True), DTYPES)
        }
        assert float(expected[False, False, torch.bfloat16].float().std()) > 1 or rows * outputs < 100
        for plan in plans(rows, outputs, width):
            for (scaled, biased, dtype), wanted in expected.items():
                out = torch.full((rows, outputs), float("nan"), dtype=dtype, device="cuda")
                gemm_prefill.linear(*case.operands(scaled, biased), dtype, out=out, plan=plan)
                what = f"{rows}x{outputs}x{width} w{weight_bits} {plan} scaled={scaled} biased={biased} {dtype}"
                failures.append(difference(out, wanted, what))
                runs += 1
    wrong = [failure for failure in failures if failure]
    assert not wrong, f"{len(wrong)} of {runs} runs:\n" + "\n".join(wrong[:20])


@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize(("outputs", "width"), [(203, 200), (1, 16), (65, 130)])
def test_linear_when_rows_do_not_fill_16_bytes_expect_padding_to_be_invisible(outputs, width, weight_bits) -> None:

    for rows in (1, 129):
        case = problem(rows, outputs, width, weight_bits)
        wanted = case.value(True, True).to(torch.bfloat16)
        result = gemm_prefill.linear(*case.operands(True, True), torch.bfloat16)
        assert result.is_contiguous()
        assert difference(result, wanted, f"{rows}x{outputs}x{width} w{weight_bits}") is None
        out = torch.full_like(result, float("nan"))
        assert gemm_prefill.linear(*case.operands(True, True), torch.bfloat16, out=out) is out
        assert torch.equal(out, wanted)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize(("ffn", "width"), [(32, 128), (104, 1040), (256, 4096), (2048, 11008)])
def test_swiglu_quant_when_codes_fill_their_range_expect_float64_up_to_ties(ffn, width, weight_bits, bits) -> None:

    if (weight_bits, bits) == (8, 4):
        pytest.skip("the clamp does not depend on the weight's bits")
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    failures = []
    for rows in ROWS:
        case = problem(rows, 2 * ffn, width, weight_bits, spread=8.0 if bits == 8 else 2.6, extreme=False)
        for scaled, biased in ((False, False), (True, False), (True, True), (False, True)):
            gate, up = case.value(scaled, biased).double().view(rows, ffn // 8, 2, 8).unbind(2)
            exact = (gate / (1 + torch.exp(-gate)) * up).reshape(rows, ffn)
            wanted = exact.round().clamp(low, high)
            if rows * ffn > 1000:
                assert float(wanted.std()) > high / 6, "codes do not fill their range"
                assert 0 < float((exact.round() != wanted).double().mean()) < 0.5, "saturation is not exercised"
            for plan in plans(rows, 2 * ffn, width):
                out = torch.full((rows, ffn), POISON, dtype=torch.int8, device="cuda")
                gemm_prefill.swiglu_quant(*case.operands(scaled, biased), bits, out=out, plan=plan)
                distance = (out.double() - wanted).abs()
                worst, share = float(distance.max()), float((distance > 0).double().mean())
                if worst > 1 or share > max(2e-3, 1.5 / out.numel()):
                    m, n = divmod(int(distance.argmax()), ffn)
                    failures.append(
                        f"{rows}x{ffn}x{width} w{weight_bits} a{bits} {plan} scaled={scaled} biased={biased}: share "
                        f"{share:.1e}, worst {worst} at ({m}, {n}): {int(out[m, n])} is not {int(wanted[m, n])}"
                    )
    assert not failures, "\n".join(failures[:20])


@pytest.mark.parametrize(("rows", "outputs", "width"), [(256, 4096, 4096), (512, 12288, 4096), (384, 4096, 11008)])
def test_linear_when_tiles_are_divided_expect_the_same_bits_many_times_and_flags_at_zero(rows, outputs, width) -> None:

    case = problem(rows, outputs, width, 4)
    wanted = case.value(False, False).to(torch.bfloat16)
    divided = [plan for plan in plans(rows, outputs, width) if plan.whole == 0]
    assert divided
    for plan in divided:
        outs = [torch.full((rows, outputs), float("nan"), dtype=torch.bfloat16, device="cuda") for _ in range(20)]
        for out in outs:
            gemm_prefill.linear(*case.operands(False, False), torch.bfloat16, out=out, plan=plan)
        failures = [difference(out, wanted, f"{plan} run {i}") for i, out in enumerate(outs)]
        assert not any(failures), "\n".join(failure for failure in failures if failure)
    rows_of_flags = [row for pool in gemm_prefill._pools.values() for row in pool.taken.values()]
    assert rows_of_flags
    assert all(int(row.abs().sum()) == 0 for row in rows_of_flags)


def test_linear_when_captured_expect_replays_on_several_streams_to_be_exact() -> None:
    """Two graphs with divided tiles, replayed at the same time on two streams: each has flags of its own."""

    cases = [problem(512, 4096, 4096, 4, seed) for seed in (1, 2)]
    plan = next(plan for plan in plans(512, 4096, 4096) if plan.whole == 0)
    graphs, outs = [], []
    gemm_prefill.linear(*cases[0].operands(True, True), torch.bfloat16, plan=plan)
    for case in cases:
        outs.append(torch.full((512, 4096), float("nan"), dtype=torch.bfloat16, device="cuda"))
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            for _ in range(5):
                gemm_prefill.linear(*case.operands(True, True), torch.bfloat16, out=outs[-1], plan=plan)
    for out in outs:
        out.fill_(float("nan"))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(5):
        for stream, graph in zip(streams, graphs):
            with torch.cuda.stream(stream):
                graph.replay()
    torch.cuda.synchronize()
    for number, (case, out) in enumerate(zip(cases, outs)):
        assert difference(out, case.value(True, True).to(torch.bfloat16), f"graph {number}") is None


def test_kernels_when_overlapped_expect_the_bits_of_a_serial_run() -> None:
    """Codes of one kernel are the input of the next: an early read or a late write would change them."""

    first = problem(256, 2 * 4096, 4096, 4)
    second = problem(256, 4096, 4096, 4)

    def chain(codes: Tensor) -> Tensor:
        for _ in range(6):
            codes = gemm_prefill.swiglu_quant(codes, *first.operands(False, False)[1:], 8)
        return gemm_prefill.linear(codes, *second.operands(True, True)[1:], torch.bfloat16)

    serial = chain(first.codes)
    torch.cuda.synchronize()
    with overlapping():
        overlapped = [chain(first.codes) for _ in range(5)]
    for number, result in enumerate(overlapped):
        assert difference(result, serial, f"overlapped run {number}") is None


def test_linear_when_the_result_type_is_unknown_expect_an_error() -> None:

    with pytest.raises(KernelError, match=r"not torch\.float32"):
        gemm_prefill.linear(*problem(1, 64, 128, 4).operands(False, False), torch.float32)


def test_linear_when_there_are_no_rows_expect_an_empty_result() -> None:

    codes, *others = problem(1, 64, 128, 4).operands(False, False)
    assert gemm_prefill.linear(codes[:0], *others, torch.bfloat16).shape == (0, 64)
