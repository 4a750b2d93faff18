"""The bench on a GPU: baselines right, ceilings plausible, every phase with every scheme, on a small shape."""

import json

import pytest
import torch
from torch import Tensor

from mergequant.bench import Ceilings, Cell, Request, plain, run_bench
from mergequant.bench.baselines import CachePool, FloatScheme
from mergequant.bench.ceilings import measure_ceilings
from mergequant.bench.float_decoder import FloatDecoder, State, library_attention
from mergequant.runtime import DecoderShape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with CUDA"),
]
CUDA = torch.device("cuda", 0)
SHAPES = {
    "mha": DecoderShape(
        layers=2, channels=512, heads=4, kv_heads=4, head_width=128, ffn=1408, vocabulary=1000, positions=1024
    ),
    "gqa with norms of heads": DecoderShape(
        layers=2,
        channels=512,
        heads=8,
        kv_heads=2,
        head_width=128,
        ffn=1408,
        vocabulary=1000,
        positions=1024,
        qk_norm=True,
    ),
}
fp8_only = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9), reason="no fp8 products"
)


def _distance(got: Tensor, wanted: Tensor) -> float:
    return float((got.cpu().float() - wanted.cpu().float()).norm() / wanted.cpu().float().norm())


def _pair(shape: DecoderShape, fp8: bool) -> tuple[FloatDecoder, FloatDecoder]:
    """A decoder on the GPU with Triton's kernels, and the same weights with plain torch on the CPU."""
    torch.manual_seed(0)
    fast = FloatDecoder(shape, fp8, CUDA, shape.positions)
    slow = FloatDecoder(shape, fp8, torch.device("cpu"), shape.positions, plain)
    fast.embedding.mul_(50)
    slow.embedding, slow.head = fast.embedding.cpu(), fast.head.cpu()
    for mine, theirs in zip(fast.layers, slow.layers, strict=True):
        for name, linear in mine.items():
            if linear.scale is None:
                linear.weight.mul_(3)
            else:
                linear.scale.mul_(3)
                theirs[name].scale = linear.scale.cpu()
            theirs[name].weight = linear.weight.cpu()
    return fast, slow


def _state(decoder: FloatDecoder, batch: int, capacity: int) -> State:
    cache = CachePool().get(decoder.shape, batch, capacity, decoder.device)
    lengths = torch.zeros(batch, dtype=torch.int32, device=decoder.device)
    tokens = torch.zeros(batch, dtype=torch.long, device=decoder.device)
    return State(tokens, lengths, cache, decoder.kernels.decode_attention, capacity)


@fp8_only
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@torch.no_grad()
def test_baselines_equal_plain_torch(shape: DecoderShape, fp8: bool) -> None:
    fast, slow = _pair(shape, fp8)
    tokens = torch.randint(shape.vocabulary, (3, 70))
    states = _state(fast, 3, 128), _state(slow, 3, 128)
    bound = 0.1 if fp8 else 0.02  # a code of fp8 that falls to the other side is 6 %
    got, wanted = (d.prefill(tokens.to(d.device), s) for d, s in zip((fast, slow), states))
    assert float(wanted.float().std()) > 0.1
    assert _distance(got, wanted) < bound
    for place in (70, 71):
        for state in states:
            state.tokens.copy_(tokens[:, place - 70])
            state.lengths.fill_(place)
            state.context = place + 1
        got, wanted = fast.step(states[0]), slow.step(states[1])
        assert _distance(got, wanted) < bound, f"step at {place}"


@pytest.mark.parametrize("length", [1, 63, 65, 700, 2048])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (32, 4)])
def test_decode_attention_of_every_backend(heads: int, kv_heads: int, length: int) -> None:
    from torch.nn.attention import SDPBackend

    from mergequant.bench import kernels

    torch.manual_seed(length)
    queries = torch.randn(3, heads, 128, device=CUDA, dtype=torch.bfloat16)
    keys, values = (torch.randn(3, kv_heads, 2112, 128, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    wanted = plain.decode_attention(queries, keys, values, length)
    found = {"triton": kernels.decode_attention(queries, keys, values, length)}
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        try:
            found[name] = library_attention(backend)(queries, keys, values, length)
        except RuntimeError as error:
            print(f"{name} does not run: {str(error).splitlines()[0]}")
    for name, got in found.items():
        assert _distance(got, wanted) < 0.01, name


@torch.no_grad()
def test_captured_jobs_repeat_the_same_step_and_generate_what_steps_would() -> None:
    shape = SHAPES["mha"]
    scheme = FloatScheme(shape, False, CUDA, 1024, CachePool())
    job = scheme.decode(2, 256, 16)
    state = job.holds[0]
    state.tokens.fill_(7)
    job.run()
    first = state.tokens.clone()
    assert int(state.lengths[0]) == 255
    state.tokens.fill_(7)
    job.run()
    assert torch.equal(state.tokens, first)
    job = scheme.generate(2, 64, 70, 16)
    job.run()
    assert int(job.holds[1].lengths[0]) == 64 + 69


def test_ceilings_are_plausible() -> None:
    """Rates of a GPU that no other process uses: run this file without other workers."""
    found = measure_ceilings(CUDA, fp8=torch.cuda.get_device_capability() >= (8, 9))
    print(found.to_dict())
    assert 0.1 < found.read < 20
    assert all(0.05 < rate < 20 for rate in found.read_by_size.values())
    assert 0.3 < found.launch < 20
    assert all(10 < rate.sustained < 10_000 for rate in found.rates.values())
    if torch.cuda.get_device_name().endswith("H200"):  # 4.8 TB/s, 1979 TOPS
        assert 4.0 < found.read < 4.8
        assert 1500 < found.rates["int8"].sustained < 1990


@fp8_only
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_every_phase_measures_every_scheme(shape: DecoderShape) -> None:
    cells = {phase: (Cell(2, 192),) for phase in ("memory", "prefill", "decode", "e2e")}
    request = Request(
        "small", shape, CUDA, cells=cells, passes=2, new_tokens=70, gemm_rows=(1, 64, 2048), command="test"
    )
    report = run_bench(request, print)
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    print("\n".join(found["notes"]))
    assert isinstance(report.ceilings, Ceilings)
    rows = {(r.phase, r.scheme, r.kv, r.what, r.batch, r.mode): r for r in report.rows}
    assert len(rows) == len(report.rows)
    for phase in ("decode", "prefill", "e2e"):
        own = [row for row in report.rows if row.phase == phase]
        wanted = [("bf16", 16), ("fp8", 16)] + [("w4a8", kv) for kv in ((16, 8, 4) if phase == "decode" else (4,))]
        assert [(row.scheme, row.kv) for row in own] == wanted
        for row in own:
            assert None not in (row.ms, row.vs_bf16, row.vs_fp8)
            assert 0 < row.percent_of_ceiling < 110, row
    gemms = [row for row in report.rows if row.phase == "gemm"]
    assert len(gemms) == 4 * 4 * (2 + 2)  # layers, schemes, cold at two sizes and both modes at one
    # Without its CUDA kernels mergequant would still run: the rows have to say what ran.
    if torch.cuda.get_device_capability() == (9, 0):
        assert all("tiled_linear (cuda)" in row.kernels for row in report.rows if row.scheme == "w4a8" and row.ms)
    # At this size workspaces outweigh weights and caches, so the peak only has to be there.
    assert rows["memory", "w4a8", 4, "peak", 2, None].vs_bf16 is not None
    assert rows["memory", "w4a8", 4, "cache", 2, None].vs_bf16 == 4
    assert not [note for note in found["notes"] if "fell back" in note]
