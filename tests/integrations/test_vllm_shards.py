"""Shares of single layers: integers of all GPUs sum to those of one, for every kind of input."""

from dataclasses import replace

import pytest
import torch

from mergequant import ops
from mergequant.errors import CheckpointError, UsageError
from mergequant.grids import pack_codes
from mergequant.integrations.vllm.placement import Placement
from mergequant.integrations.vllm.report import Report, summary
from mergequant.integrations.vllm.served import ServedLinear, ServedNorm
from mergequant.integrations.vllm.shards import Share, column_share, rows_of
from mergequant.nn import InputSpec, LinearSpec, NormSpec, QuantLinear

WIDTH, OUTPUTS, TOKENS = 48, 12, 5
ROTATION = ops.rotation(WIDTH).name
SPLIT = 56  # columns after channels were split and padded
INPUTS = {
    "static": InputSpec("static", WIDTH, WIDTH),
    "static-channels": InputSpec("static", WIDTH, WIDTH, per_channel=True, shifts=True),
    "static-split": InputSpec("static", WIDTH, SPLIT, bits=4, per_channel=True, gathers=True, shifts=True),
    "static-tensor-split": InputSpec("static", WIDTH, SPLIT, gathers=True, shifts=True),
    "static-rotated": InputSpec("static", WIDTH, WIDTH, rotation=ROTATION, per_channel=True),
    "static-rotated-split": InputSpec("static", WIDTH, SPLIT, rotation=ROTATION, per_channel=True, gathers=True),
    "dynamic-rotated": InputSpec("dynamic", WIDTH, WIDTH, bits=4, rotation=ROTATION, clip_ratio=0.9),
    "dynamic-factors": InputSpec("dynamic", WIDTH, WIDTH, left=6, right=8),
    "dynamic-merged": InputSpec("dynamic", WIDTH, 40, gathers=True, merges=(6, 2)),
}


def layer(source: InputSpec, seed: int = 0, **changes: object) -> QuantLinear:
    spec = replace(LinearSpec(OUTPUTS, source, bias=True), **changes)
    generator = torch.Generator().manual_seed(seed)
    module = QuantLinear(spec)
    codes = torch.randint(-4, 4, (spec.outputs, source.width), generator=generator, dtype=torch.int8)
    module.weight_codes.copy_(pack_codes(codes, spec.weight_bits))
    module.weight_scale.copy_(torch.rand(spec.outputs, generator=generator) + 0.5)
    if module.bias is not None:
        module.bias.copy_(torch.randn(spec.outputs, generator=generator))
    quantizer = module.input_quantizer
    if quantizer is not None:
        if quantizer.multiplier is not None:
            quantizer.multiplier.copy_(3 * torch.rand(quantizer.multiplier.shape, generator=generator) + 1)
        if quantizer.shift is not None:
            quantizer.shift.copy_(torch.rand(quantizer.shift.shape, generator=generator) - 0.5)
        if quantizer.index is not None:
            count = quantizer.index.shape[0]
            quantizer.index.copy_(torch.randint(0, source.in_width, (count,), generator=generator))
    return module


def served(module: QuantLinear, share: Share, x: torch.Tensor, cuts_columns: bool = True) -> ServedLinear:
    rows = module.spec.outputs if cuts_columns else module.spec.outputs // share.size
    made = ServedLinear({"block.o": module.spec}, [rows], share, cuts_columns, torch.float32, lambda _: x)
    placement = Placement()
    made.place(placement)
    assert not list(placement.take((f"block.o.{name}", value) for name, value in module.state_dict().items()))
    placement.require_all()
    made.finish()
    return made


def sums(made: ServedLinear, codes: torch.Tensor, outputs: int) -> torch.Tensor:
    """Exact integer products."""
    weight = ops.untile_weight(made.tiles, outputs, made.width, made.spec.gemm_bits)
    return codes.long() @ weight.long().t()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", INPUTS)
def test_integers_of_all_shares_sum_to_the_whole_layers(name: str, size: int) -> None:
    module = layer(INPUTS[name])
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))
    assert module.input_quantizer is not None
    codes, scale = module.input_quantizer(x)
    want = codes.long() @ module.integer_weight().long().t()
    total, floats = torch.zeros_like(want), torch.zeros(TOKENS, OUTPUTS)
    for rank, own in enumerate(x.chunk(size, -1)):
        made = served(module, Share(rank, size), x)
        found, token_scale = made._codes(own)
        assert (token_scale is None) == (scale is None)
        assert token_scale is None or torch.equal(token_scale, scale)
        total += sums(made, found, OUTPUTS)
        floats += made(own)
    assert torch.equal(total, want)
    torch.testing.assert_close(floats, module(x))


@pytest.mark.parametrize("size", [2, 4])
def test_scale_of_a_share_is_finer_than_the_whole_tokens(size: int) -> None:
    module = layer(InputSpec("dynamic", WIDTH, WIDTH, bits=4))
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(1))
    float_result = x @ module.decoded_weight().t() + module.bias
    total = torch.zeros_like(float_result)
    for rank, own in enumerate(x.chunk(size, -1)):
        made = served(module, Share(rank, size), x)
        assert (made._codes(own)[1] <= module.input_quantizer(x)[1]).all()
        total += made(own)
    assert (total - float_result).square().mean() < (module(x) - float_result).square().mean()


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_rows_of_all_shares_are_the_whole_layers(bits: int) -> None:
    module = layer(InputSpec("codes", WIDTH, WIDTH), weight_bits=bits)
    codes = torch.randint(-7, 8, (TOKENS, WIDTH), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
    parts = [served(module, Share(rank, 4), codes, cuts_columns=False)(codes) for rank in range(4)]
    module.out_dtype = torch.float32
    assert torch.equal(torch.cat(parts, -1), module(codes))


def test_key_heads_lie_on_several_gpus_where_there_are_fewer() -> None:
    starts = [rows_of("k", 20, 10, Share(rank, 4)) for rank in range(4)]  # 2 heads of 10 rows
    assert starts == [0, 0, 10, 10]
    assert [rows_of("q", 40, 10, Share(rank, 4)) for rank in range(4)] == [0, 10, 20, 30]
    with pytest.raises(CheckpointError, match="tensor-parallel-size"):
        rows_of("q", 40, 15, Share(0, 4))


def test_a_share_without_any_gathered_column_still_multiplies() -> None:
    index = torch.zeros(8, dtype=torch.int32)  # all codes read channel 0
    share = column_share("o", InputSpec("static", 4, 8, per_channel=True, gathers=True), index, Share(1, 2))
    assert share.columns.numel() == 0
    assert share.take(torch.ones(3, 8, dtype=torch.int8)).sum() == 0


def test_uneven_channels_are_refused_in_words() -> None:
    with pytest.raises(CheckpointError, match="cannot be cut for 5 GPUs"):
        column_share("o", INPUTS["static"], None, Share(0, 5))


def test_layers_coded_in_two_ways_are_refused() -> None:
    four, eight = LinearSpec(8, InputSpec("codes", 8, 8, bits=4)), LinearSpec(8, InputSpec("codes", 8, 8))
    with pytest.raises(UsageError, match="compressed-tensors"):
        ServedLinear({"b.q": four, "b.k": eight}, [8, 8], Share(), False, torch.float32)


def test_unknown_kinds_of_layers_are_refused() -> None:
    spec = LinearSpec(8, InputSpec("float", 8, 8), group_size=4, across=True)
    with pytest.raises(UsageError, match="no kernel here"):
        ServedLinear({"b.q": spec}, [8], Share(), False, torch.float32)


def test_report_counts_layers_by_kind(caplog: pytest.LogCaptureFixture) -> None:
    report = Report()
    for _ in range(2):
        report.expect()
    x = torch.zeros(1, WIDTH)
    with caplog.at_level("INFO", "vllm.mergequant"):
        for number in range(2):
            made = served(layer(INPUTS["static"]), Share(), x)
            made.layers = {f"model.layers.{number}.o_proj": made.spec}
            report.add(made.kernel())
    assert summary(report.kernels.values()) == [
        "2 x model.layers.*.o_proj: 12 x 48, int4 weights, static int8: tiled_linear (torch)"
    ]
    assert "mergequant serves 2 x model.layers.*.o_proj" in caplog.text


def test_served_parts_compile_without_a_break() -> None:
    x = torch.randn(5, 48)
    norm = ServedNorm("norm", NormSpec("rms", 48, 48, 8, 1e-6))
    made = served(layer(INPUTS["static-split"]), Share(), x)

    def both(x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        codes, residual = norm(x, residual)
        return made(codes.float()), residual

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (5, 3):
        got, want = (f(x[:tokens], torch.ones(tokens, 48)) for f in (compiled, both))
        assert all(torch.equal(a, b) for a, b in zip(got, want))
