"""The decode GEMMs and the W4A4 GEMM without a GPU: the assembler's report, and which configuration is chosen."""

import re

import pytest

from mergequant.errors import KernelError
from mergequant.ops.cuda import compiler, gemm, gemm_decode, gemm_s4
from mergequant.ops.cuda.compiler import Unit, compile_unit
from mergequant.ops.cuda.gemm_decode import CLUSTERS, STREAMS, Cluster, Stream, choose, configurations

needs_nvrtc = pytest.mark.skipif(compiler.unavailable() is not None, reason=str(compiler.unavailable()))
H200 = 132  # multiprocessors
REGISTERS, BLOCK_RESERVE = 65536, 1024
SHARED = 228 * 1024
# Of each ring a linear layer whole, and SwiGLU in the most parts, whose epilogue holds the most registers.
TIGHT = [(known, 0 if known.parts == 1 else 8) for known in CLUSTERS if known.parts in (1, 8)]


def report(unit: Unit, architecture: str = "sm_90a") -> tuple[str, int]:
    """PTX and registers of a unit that neither spills nor serializes wgmma."""
    compiled = compile_unit(unit, architecture)
    assert "0 bytes spill stores, 0 bytes spill loads" in compiled.log, compiled.log
    # C7510..C7520 say that wgmma is serialized: half the speed, and not even a warning to the assembler.
    assert not re.search(r"C75\d\d", compiled.log), compiled.log
    found = re.search(r"Used (\d+) registers", compiled.log)
    assert found
    return compiled.ptx, int(found[1])


@needs_nvrtc
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("configuration", STREAMS, ids=str)
def test_stream_when_compiled_expect_no_spills_and_its_blocks_side_by_side(
    configuration: Stream, weight_bits: int
) -> None:
    code_bits = 8 if weight_bits == 8 else 0
    ptx, registers = report(gemm_decode.stream_unit(configuration, weight_bits, code_bits, False))
    a_unit = 2 if weight_bits == 4 else 1
    wanted = configuration.depth * configuration.token_tiles * a_unit
    assert ptx.count("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32") == wanted
    # First the ring of registers is filled, then each place again as it is used.
    assert ptx.count("ld.global.nc.L1::no_allocate.v4") == 2 * configuration.depth
    assert -(-registers // 8) * 8 * 32 * configuration.warps * configuration.blocks <= REGISTERS


@needs_nvrtc
@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize(("configuration", "code_bits"), TIGHT, ids=str)
def test_cluster_when_compiled_expect_no_spills_and_wgmma_in_flight(
    configuration: Cluster, code_bits: int, weight_bits: int
) -> None:
    ptx, registers = report(gemm_decode.cluster_unit(configuration, weight_bits, code_bits, False))
    assert ptx.count(f"wgmma.mma_async.sync.aligned.m64n{configuration.tokens}k32.s32.s8.s8") == 4
    assert ("cvt.rn.bf16x2.f32" in ptx) == (code_bits == 0)
    warps = 10  # 9, of which registers are given out in pairs
    assert -(-registers // 8) * 8 * 32 * warps * configuration.blocks <= REGISTERS


@needs_nvrtc
def test_units_when_results_are_half_or_narrow_codes_expect_it_in_the_code() -> None:
    stream, cluster = STREAMS[0], CLUSTERS[0]
    for make in (
        lambda bits, half: gemm_decode.stream_unit(stream, 4, bits, half),
        lambda bits, half: gemm_decode.cluster_unit(cluster, 4, bits, half),
    ):
        assert "cvt.rn.f16x2.f32" in report(make(0, True))[0]
        narrow = report(make(4, False))[0]
        assert re.search(r"min\.s32.*, 7;", narrow)
        assert re.search(r"max\.s32.*, -8;", narrow)


@needs_nvrtc
@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89"])
@pytest.mark.parametrize("configuration", gemm_s4.CONFIGURATIONS, ids=str)
def test_s4_when_compiled_expect_the_four_bit_instruction_and_no_spills(
    configuration: gemm_s4.Configuration, architecture: str
) -> None:
    ptx, registers = report(gemm_s4.unit(configuration, False), architecture)
    # Two k-steps of 64 in a stage; on these architectures the instruction is one of the machine's own.
    wanted = 2 * configuration.tiles_m * configuration.tiles_n
    assert ptx.count("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32") == wanted
    assert registers <= 128
    assert compile_unit(gemm_s4.unit(configuration, True), architecture).ptx.count("cvt.rn.f16x2.f32") > 0


@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("configuration", CLUSTERS, ids=str)
def test_cluster_when_its_ring_is_cut_expect_it_to_fit_and_hide_latency(
    configuration: Cluster, weight_bits: int
) -> None:
    assert configuration.stages(weight_bits) >= 3
    used = configuration.shared(weight_bits)
    assert used >= configuration.stages(weight_bits) * (configuration.tokens * 128 + weight_bits * 2048) + 1024
    assert (used + BLOCK_RESERVE) * configuration.blocks <= SHARED


@pytest.mark.parametrize("processors", [78, H200])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 17, 33, 64, 65, 128])
@pytest.mark.parametrize(("outputs", "width"), [(64, 128), (200, 192), (4096, 11008), (57344, 8192), (32, 130_000)])
@pytest.mark.parametrize("swiglu", [False, True])
def test_choose_when_any_shape_expect_a_configuration_that_runs_it(
    rows: int, outputs: int, width: int, swiglu: bool, processors: int
) -> None:
    chosen = choose(rows, outputs, width, swiglu, processors)
    assert rows <= chosen.tokens
    assert chosen in configurations(rows, outputs, width)
    if isinstance(chosen, Stream):
        assert chosen.shared(rows, width) <= SHARED // chosen.blocks - BLOCK_RESERVE
    else:
        assert chosen.tokens < 2 * max(rows, 5)
        assert chosen.parts <= -(-width // 128)


@pytest.mark.parametrize(
    ("rows", "outputs", "width", "swiglu", "expected"),
    [
        # Llama-2-7B: all measured best of the cluster configurations on an NVIDIA H200.
        (1, 4096, 4096, False, Stream(1, 8, 8, 2)),  # o
        (4, 4096, 11008, False, Stream(1, 8, 8, 2)),  # down
        (1, 22016, 4096, True, Cluster(8, 1, 2)),  # gate and up
        (64, 22016, 4096, True, Cluster(64, 1, 2)),
        (16, 4096, 4096, False, Cluster(16, 4, 2)),
        (32, 4096, 4096, False, Cluster(32, 2, 2)),
        (64, 4096, 4096, False, Cluster(64, 2, 1)),
        (128, 4096, 4096, False, Cluster(128, 2, 1)),
        (16, 12288, 4096, False, Cluster(16, 2, 2)),  # qkv
        (32, 12288, 4096, False, Cluster(32, 2, 2)),
        (64, 12288, 4096, False, Cluster(64, 1, 1)),
        (8, 4096, 11008, False, Cluster(8, 6, 2)),  # down
        (32, 4096, 11008, False, Cluster(32, 6, 2)),
        (64, 4096, 11008, False, Cluster(64, 3, 1)),
        (128, 4096, 11008, False, Cluster(128, 3, 1)),
        # Not measured.
        (16, 6144, 4096, False, Cluster(16, 4, 2)),  # qkv of llama-3-8b
        (16, 8192, 28672, False, Cluster(16, 3, 2)),  # down of llama-2-70b
        (2, 4096, 130_000, False, Cluster(8, 6, 2)),  # x does not fit the stream kernel
    ],
)
def test_choose_when_shapes_are_those_of_models_expect_what_the_rule_says(
    rows: int, outputs: int, width: int, swiglu: bool, expected: object
) -> None:
    assert choose(rows, outputs, width, swiglu, H200) == expected


def test_choose_when_there_are_too_many_tokens_expect_error() -> None:
    assert configurations(129, 4096, 4096) == []
    with pytest.raises(KernelError, match="up to 128 tokens, not 129"):
        choose(129, 4096, 4096, False, H200)


@pytest.mark.parametrize(("rows", "tokens"), [(1, 16), (16, 16), (17, 128), (4096, 128)])
def test_s4_choose_when_tokens_are_few_expect_small_blocks(rows: int, tokens: int) -> None:
    assert gemm_s4.choose(rows).tokens == tokens


@pytest.mark.parametrize(
    ("rows", "outputs", "expected"),
    [(1, 57344, True), (33, 22016, False), (64, 12288, True), (64, 22016, False), (65, 4096, False)],
)
def test_decodes_when_tokens_or_outputs_grow_expect_prefill(rows: int, outputs: int, expected: bool) -> None:
    assert gemm.decodes(rows, outputs, H200) is expected
