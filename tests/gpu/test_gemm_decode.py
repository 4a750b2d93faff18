"""The decode GEMMs on a GPU: bit-equal to the exact product for every configuration, overlapped or not."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mergequant import ops
from mergequant.errors import KernelError
from mergequant.ops.backends import use_backend
from mergequant.ops.overlap import overlapping
from mergequant.ops.tiles import tile_weight, untile_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs an sm_90 GPU"
    ),
]

ROWS = (1, 2, 3, 5, 8, 16, 17, 33, 64, 100, 128)
OUTPUTS = (64, 200, 512, 4096, 6144)
WIDTHS = (128, 192, 1040, 4096, 11008, 14336)
DTYPES = (torch.bfloat16, torch.float16)
POISON = 85  # of codes; floats are poisoned with NaN
SHOWN = 12  # failures of a test that are printed


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """All kernels that the tests below use, compiled side by side."""
    from mergequant.ops.cuda import gemm_decode, launch

    device = torch.device("cuda", torch.cuda.current_device())
    wanted = []
    for bits, (code_bits, half) in itertools.product((4, 8), ((0, False), (0, True), (8, False), (4, False))):
        wanted += [(gemm_decode.stream_unit(c, bits, code_bits, half), "gemm_stream") for c in gemm_decode.STREAMS]
        wanted += [(gemm_decode.cluster_unit(c, bits, code_bits, half), "gemm_cluster") for c in gemm_decode.CLUSTERS]
    launch.prepare(wanted, device)


@dataclass
class Problem:
    """Random full-range operands for the most rows, with their exact product in float64 (rows, outputs)."""

    codes: Tensor
    tiles: Tensor
    exact: Tensor
    weight_scale: Tensor
    token_scale: Tensor
    bias: Tensor
    weight_bits: int

    def value(self, rows: int, scaled: bool, biased: bool) -> Tensor:
        """Float32 result of the first rows, one rounding per operation."""
        value = self.exact[:rows].float() * self.weight_scale
        value = value * self.token_scale[:rows, None] if scaled else value
        return value + self.bias if biased else value

    def operands(self, rows: int, scaled: bool, biased: bool) -> tuple[Tensor | int | None, ...]:
        token_scale = self.token_scale[:rows] if scaled else None
        return (
            *(self.codes[:rows], self.tiles, self.weight_scale, token_scale),
            *(self.bias if biased else None, self.weight_bits),
        )


def problem(
    outputs: int, width: int, weight_bits: int, rows: int = 128, spread: float = 8.0, extreme: bool = True
) -> Problem:
    """`spread`: standard deviation of the float results. `extreme`: one of the sums is the largest that there is."""
    generator = torch.Generator("cuda").manual_seed(outputs * 11 + width * 13 + weight_bits)
    high = 1 << (weight_bits - 1)
    draw = {"generator": generator, "device": "cuda"}
    codes = torch.randint(-128, 128, (rows, width), dtype=torch.int8, **draw)
    weight = torch.randint(-high, high, (outputs, width), dtype=torch.int8, **draw)
    if extreme:
        codes[0], weight[0] = -128, -high
    made = Problem(
        codes,
        tile_weight(weight, weight_bits),
        codes.double() @ weight.double().t(),
        (torch.rand(outputs, **draw) + 0.5) * spread / (73.9 * high * 0.577 * width**0.5),
        torch.rand(rows, **draw) + 0.5,
        torch.randn(outputs, **draw) * spread / 4,
        weight_bits,
    )
    torch.cuda.synchronize()
    return made


def fenced(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A poisoned result, and the poisoned memory that it lies in the middle of."""
    whole = torch.full((rows + 2, columns), POISON if dtype == torch.int8 else torch.nan, dtype=dtype, device="cuda")
    return whole[1:-1], whole


def trespassed(whole: Tensor) -> bool:
    """Whether a kernel wrote before or behind its result."""
    edges = whole[[0, -1]]
    return bool((edges != POISON).any() if whole.dtype == torch.int8 else (~edges.isnan()).any())


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


def run(configuration, operands, result: Tensor, code_bits: int, overlap: bool) -> None:  # type: ignore[no-untyped-def]
    from mergequant.ops.cuda import gemm_decode

    stream = isinstance(configuration, gemm_decode.Stream)
    launch = gemm_decode.launch_stream if stream else gemm_decode.launch_cluster
    launch(configuration, *operands, result, code_bits, overlap)


@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("outputs", OUTPUTS)
def test_linear_when_any_configuration_runs_expect_the_exact_product_bit_for_bit(
    outputs: int, width: int, weight_bits: int
) -> None:
    from mergequant.ops.cuda import gemm_decode

    case, failures, runs = problem(outputs, width, weight_bits), [], 0
    for rows in ROWS:
        for scaled, biased, dtype in itertools.product((False, True), (False, True), DTYPES):
            expected = case.value(rows, scaled, biased).to(dtype)
            assert float(expected.float().std()) > 1
            for configuration in gemm_decode.configurations(rows, outputs, width):
                result, whole = fenced(rows, outputs, dtype)
                run(configuration, case.operands(rows, scaled, biased), result, 0, bool(runs % 2))
                what = f"rows {rows} {configuration} scale {scaled} bias {biased} {dtype} overlap {runs % 2}"
                failures += [text for text in [difference(result, expected, what)] if text]
                failures += [f"{what}: wrote outside its result"] if trespassed(whole) else []
                runs += 1
    assert runs > 8 * 6 * len(ROWS)
    assert not failures, f"{len(failures)} of {runs} wrong:\n" + "\n".join(failures[:SHOWN])


def swiglu(case: Problem, rows: int, scaled: bool, biased: bool, bits: int) -> Tensor:
    """Codes by float64."""
    value = case.exact[:rows] * case.weight_scale.double()
    value = value * case.token_scale[:rows, None].double() if scaled else value
    value = value + case.bias.double() if biased else value
    gate, up = value.view(rows, -1, 2, 8).unbind(2)
    product = (gate / (1 + torch.exp(-gate)) * up).reshape(rows, -1)
    return product.round().clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def far(result: Tensor, expected: Tensor, what: str) -> str | None:
    """None if codes are those of float64 but for a step next to a tie (float32 errs by 1e-4 of a step); else where."""
    off = (result.double() - expected).abs()
    count, most = int((off > 0).sum()), int(off.max())
    if most <= 1 and count <= 1 + 2e-3 * off.numel():
        return None
    m, n = (int(i) for i in off.eq(most).nonzero()[0])
    return (
        f"{what}: {count} of {off.numel()} differ, most at ({m}, {n}): {int(result[m, n])} is not {int(expected[m, n])}"
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize(("outputs", "width"), [(64, 128), (208, 192), (512, 1040), (6144, 4096), (22016, 4096)])
def test_swiglu_when_any_configuration_runs_expect_float64_codes_but_for_ties(
    outputs: int, width: int, weight_bits: int, bits: int
) -> None:
    from mergequant.ops.cuda import gemm_decode

    case, failures, runs = problem(outputs, width, weight_bits, extreme=False), [], 0
    up = torch.arange(outputs, device="cuda") % 16 >= 8
    by = 2.2 if bits == 8 else 0.14  # spreads the results over the range of the codes
    case.weight_scale[:] = torch.where(up, case.weight_scale * by, case.weight_scale * 0.5)
    case.bias[:] = torch.where(up, case.bias * by, case.bias)
    torch.cuda.synchronize()
    high = (1 << (bits - 1)) - 1
    for scaled, biased in itertools.product((False, True), (False, True)):
        whole = swiglu(case, max(ROWS), scaled, biased, bits)
        spread, saturated = float(whole.std()) / (high + 1), float((whole.abs() >= high).double().mean())
        assert 0.25 < spread < 0.65, f"std {spread} of the range"
        assert 0 < saturated < 0.4, f"{saturated} saturated"
        for rows in ROWS:
            expected = whole[:rows]
            for configuration in gemm_decode.configurations(rows, outputs, width):
                result, memory = fenced(rows, outputs // 2, torch.int8)
                run(configuration, case.operands(rows, scaled, biased), result, bits, bool(runs % 2))
                text = far(result, expected, f"rows {rows} {configuration} scale {scaled} bias {biased}")
                failures += [text] if text else []
                failures += [f"rows {rows} {configuration}: wrote outside its result"] if trespassed(memory) else []
                runs += 1
    assert runs > 4 * 6 * len(ROWS)
    assert not failures, f"{len(failures)} of {runs} wrong:\n" + "\n".join(failures[:SHOWN])


@pytest.mark.parametrize("rows", [1, 2, 8, 16, 64])
@pytest.mark.parametrize("width", [1024, 4096])
def test_chain_when_launches_overlap_expect_every_result_as_without(rows: int, width: int) -> None:
    """Each launch reads what the one before wrote, and overwrites what the one before that read."""
    from mergequant.ops.cuda import gemm_decode

    case = problem(2 * width, width, 4, rows, spread=20.0, extreme=False)  # neither dies out nor saturates
    case.weight_scale[torch.arange(2 * width, device="cuda") % 16 >= 8] *= 2
    options = gemm_decode.configurations(rows, 2 * width, width)
    start = case.codes.clone()
    torch.cuda.synchronize()

    def chain(overlap: bool) -> Tensor:
        buffers = [start.clone(), torch.full_like(start, POISON)]
        torch.cuda.synchronize()
        for step in range(50):
            operands = (buffers[step % 2], *case.operands(rows, False, True)[1:])
            run(options[step % len(options)], operands, buffers[(step + 1) % 2], 8, overlap)
        return buffers[0]

    expected = chain(False)
    assert float(expected.float().std()) > 10
    assert expected.unique().numel() > 30
    bad = [repeat for repeat in range(50) if not torch.equal(chain(True), expected)]
    assert not bad, f"repeats {bad} of 50 differ: a launch did not wait for its predecessor"


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize(("outputs", "width"), [(13, 130), (66, 1000), (1001, 4096), (4096, 11008)])
def test_ops_when_shapes_are_awkward_expect_the_reference(
    outputs: int, width: int, weight_bits: int, backend: str
) -> None:
    case, failures = problem(outputs, width, weight_bits, 300), []
    for rows, dtype, extras in itertools.product((1, 3, 17, 64, 65, 129, 300), DTYPES, (False, True)):
        codes, tiles, scale, token_scale, bias, bits = case.operands(rows, extras, extras)
        token_scale = None if token_scale is None else token_scale[:, None]
        with use_backend(backend):
            result = ops.tiled_linear(codes, tiles, scale, token_scale, bias, bits, dtype)
        expected = case.value(rows, extras, extras).to(dtype)
        failures += [text for text in [difference(result, expected, f"rows {rows} {dtype} extras {extras}")] if text]
    assert not failures, "\n".join(failures[:SHOWN])


@pytest.mark.parametrize("backend", ["cuda", "triton", "torch"])
@pytest.mark.parametrize("weight_bits", [4, 8])
def test_swiglu_op_when_any_backend_runs_expect_float64_codes_but_for_ties(weight_bits: int, backend: str) -> None:
    case = problem(1040, 1000, weight_bits, 300, extreme=False)
    case.weight_scale[torch.arange(1040, device="cuda") % 16 >= 8] *= 2
    for rows in (1, 17, 65, 300):
        codes, tiles, scale, _, _, bits = case.operands(rows, False, False)
        with use_backend(backend):
            result = ops.tiled_swiglu_quant(codes, tiles, scale, None, None, bits, 8)
        assert float(result.float().std()) > 20
        text = far(result, swiglu(case, rows, False, False, 8), f"rows {rows}")
        assert text is None, text


def test_op_when_memory_starts_off_a_copy_expect_right_results_or_an_error() -> None:
    case = problem(64, 128, 4, 3)
    shifted = torch.cat((case.codes.new_zeros(1), case.codes.view(-1)))[1:].view(3, 128)
    result = ops.tiled_linear(shifted, case.tiles, case.weight_scale, None, None, 4, torch.bfloat16)
    assert torch.equal(result, case.value(3, False, False).bfloat16())
    tiles = torch.cat((case.tiles.new_zeros(1), case.tiles.view(-1)))[1:].view(case.tiles.shape)
    with pytest.raises(KernelError, match="clone"):
        ops.tiled_linear(case.codes, tiles, case.weight_scale, None, None, 4, torch.bfloat16)


def test_op_when_captured_expect_replays_to_follow_the_input() -> None:
    case = problem(4096, 4096, 4, 64)
    codes = torch.zeros_like(case.codes[:8])

    def layer() -> Tensor:
        return ops.tiled_linear(codes, case.tiles, case.weight_scale, None, case.bias, 4, torch.bfloat16)

    with overlapping():
        layer()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            first = layer()
            second = layer()
    for start in (0, 8, 56):
        codes.copy_(case.codes[start : start + 8])
        graph.replay()
        torch.cuda.synchronize()
        expected = (case.exact[start : start + 8].float() * case.weight_scale + case.bias).bfloat16()
        assert torch.equal(first, expected)
        assert torch.equal(second, expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_tiles_when_made_on_the_gpu_expect_those_of_the_cpu(bits: int) -> None:
    half = 1 << (bits - 1)
    weight = torch.randint(-half, half, (1000, 1040), dtype=torch.int8)
    made = tile_weight(weight.cuda(), bits)
    assert torch.equal(made.cpu(), tile_weight(weight, bits))
    assert torch.equal(untile_weight(made, 1000, 1040, bits).cpu(), weight)
