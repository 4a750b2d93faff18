"""What steps see of a block: captured inputs, samples, Gram sums, and how producers absorb factors."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergequant import ops
from mergequant.calibration import BlockContext, Chain, Chunk, Role, SiteContext, StorePolicy
from mergequant.errors import NumericsError, StructureError
from mergequant.models import ModelShell, Site
from mergequant.models.roles import SiteKind
from mergequant.transforms import ChannelScheme, TokenScheme

KINDS: tuple[SiteKind, ...] = ("norm", "attention_output", "mlp_output")


def open_block(
    shell: ModelShell,
    tokens: Tensor,
    roles: tuple[Role, ...] = ("calibration", "held_out", "verify"),
    prefix: tuple[list[int], bool] | None = None,
    policy: StorePolicy | None = None,
) -> BlockContext:
    """Block 0 with one window or two per role."""
    pieces = torch.tensor_split(tokens, len(roles))
    chunks = [Chunk(piece, role) for piece, role in zip(pieces, roles)]
    chain = Chain(shell, chunks, policy or StorePolicy(torch.device("cpu")), prefix)
    shell.load_block(0)
    chain.begin_block()
    return BlockContext(chain, shell.structures[0], torch.Generator())


def site_of(context: BlockContext, kind: SiteKind, position: int = 0) -> Site:
    return [site for site in context.structure.sites if site.kind == kind][position]


def test_capture_when_site_is_the_first_norm_expect_its_outputs(shell: ModelShell, tokens: Tensor) -> None:
    context = open_block(shell, tokens)
    store = context.capture(site_of(context, "norm"))
    assert len(store) == 2  # chunks that verify are kept apart
    for number, captured in enumerate(store):
        with torch.no_grad():
            expected = context.module.input_layernorm(context.chain.hidden[number])
        assert torch.equal(captured, expected.reshape(-1, 256))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefix", [None, ([1], True)])
def test_capture_when_any_site_expect_what_its_linears_read(
    shell: ModelShell, tokens: Tensor, kind: SiteKind, prefix: tuple[list[int], bool] | None
) -> None:
    context = open_block(shell, tokens, prefix=prefix)
    site = site_of(context, kind, -1)
    read: list[Tensor] = []
    consumer = context.module.get_submodule(site.consumers[-1])
    handle = consumer.register_forward_hook(lambda _module, args, _output: read.append(args[0]))
    for number in (0, 1):
        context.chain.run(context.chain.hidden[number])
    handle.remove()
    captured = list(context.capture(site))
    assert all(torch.equal(one, other.reshape(one.shape)) for one, other in zip(captured, read, strict=True))
    assert not context.module.get_submodule(site.consumers[0])._forward_pre_hooks
    if site.norm is not None:
        assert not context.module.get_submodule(site.norm.name)._forward_hooks


def test_open_when_an_input_is_not_finite_expect_error_that_names_site_and_channel(
    shell: ModelShell, tokens: Tensor
) -> None:
    context = open_block(shell, tokens)
    with torch.no_grad():
        context.module.input_layernorm.weight[33] = float("nan")
    with pytest.raises(NumericsError, match=r"model\.layers\.0\.input_layernorm.*channel 33"):
        context.site(site_of(context, "norm")).open()


def test_capture_when_block_does_not_reach_the_site_expect_error(
    shell: ModelShell, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = open_block(shell, tokens)
    monkeypatch.setattr(context.chain, "run", lambda hidden: hidden)
    with pytest.raises(StructureError, match="not reached"):
        context.capture(site_of(context, "norm"))


def test_site_when_asked_twice_expect_one_context_with_float_weights(shell: ModelShell, tokens: Tensor) -> None:
    context = open_block(shell, tokens)
    site = site_of(context, "norm")
    own = context.site(site)
    assert context.site(site) is own
    assert own.name == f"model.layers.0.{site.name}"
    stacked = torch.cat([context.module.get_submodule(name).weight for name in site.consumers])
    assert torch.equal(own.stacked_weight(), stacked)
    own.weights[site.consumers[0]].zero_()  # a copy: the block keeps its own
    assert bool(context.module.get_submodule(site.consumers[0]).weight.any())


def test_chunks_when_roles_differ_expect_each_its_own_and_no_verify(shell: ModelShell, tokens: Tensor) -> None:
    context = open_block(shell, tokens, ("calibration", "verify", "held_out", "calibration", "verify"))
    own = context.site(site_of(context, "norm"))
    own.open()
    hidden = context.chain.hidden
    with torch.no_grad():
        outputs = [context.module.input_layernorm(hidden[number]).reshape(-1, 256) for number in range(5)]
    assert all(torch.equal(a, b) for a, b in zip(own.chunks(), [outputs[0], outputs[3]], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(own.chunks("held_out"), [outputs[2]], strict=True))
    assert list(own.chunks("verify")) == []


@pytest.mark.parametrize("wanted", [1, 2, 7, 39, 40, 41, 59, 60, 1000])
def test_sample_when_tokens_are_picked_expect_at_most_so_many_spread_over_all_chunks(
    shell: ModelShell, tokens: Tensor, wanted: int
) -> None:
    tokens[:, 0] = torch.arange(100, 105)  # with BOS everywhere rows would be equal
    context = open_block(shell, tokens[:4], ("calibration", "calibration", "held_out", "verify"))
    own = context.site(site_of(context, "norm"))
    everything = torch.cat(list(own.chunks()))  # 2 x 20 tokens
    sample = own.sample("calibration", wanted)
    assert len(sample) == (min(wanted // 2 * 2, 40) if wanted > 1 else 1)
    rows = [int((everything == row).all(1).nonzero()[0]) for row in sample]
    assert rows == sorted(set(rows))
    if wanted >= 7:
        gaps = [b - a for a, b in zip([-1, *rows], [*rows, 40])]
        assert max(gaps) <= 2 * -(-40 // len(rows))


def test_gram_when_scheme_is_static_expect_integers_of_its_codes(shell: ModelShell, tokens: Tensor) -> None:
    context = open_block(shell, tokens)
    own = context.site(site_of(context, "norm"))
    inputs = torch.cat(list(own.chunks()))
    own.scheme = ChannelScheme.plain(inputs.abs().amax(0) / 7, 4)
    gram = own.gram()
    codes = own.scheme.values(inputs).double()
    assert gram.tokens == len(inputs)
    assert torch.equal(gram.total, codes.t() @ codes)
    assert codes.unique().numel() >= 14
    torch.testing.assert_close(own.gram(TokenScheme(8).values).total, (inputs.T @ inputs).double(), rtol=0.1, atol=5.0)


def test_rotate_when_applied_expect_inputs_and_weights_turned_once(shell: ModelShell, tokens: Tensor) -> None:
    context = open_block(shell, tokens)
    own = context.site(site_of(context, "mlp_output"))
    plain, weight = next(own.chunks()).clone(), own.stacked_weight().clone()
    own.rotate()
    own.rotate()  # the second time changes nothing
    turned = next(own.chunks())
    assert own.rotation == ops.rotation(704).name
    assert not torch.allclose(turned, plain)
    product = turned @ own.stacked_weight().t()
    assert float((product - plain @ weight.t()).abs().max()) < 1e-4 * float(product.abs().max())


@pytest.mark.parametrize("kind", ["attention_output", "mlp_output"])
@pytest.mark.parametrize("prefix", [None, ([1], True)])
def test_absorb_when_producer_and_consumer_share_a_factor_expect_the_blocks_output_kept(
    shell: ModelShell, tokens: Tensor, kind: SiteKind, prefix: tuple[list[int], bool] | None
) -> None:
    context = open_block(shell, tokens, prefix=prefix)
    site = site_of(context, kind)
    assert site.producer is not None
    before = context.chain.run(context.chain.hidden[0])
    rows = site.producer.rows.stop - site.producer.rows.start
    factor = torch.rand(rows, generator=torch.Generator().manual_seed(0)) * 3 + 0.2
    context.absorb(site.producer, factor)
    if kind == "attention_output":
        context.absorb_in_prefix(factor)
    changed = context.chain.run(context.chain.hidden[0])
    assert float((changed - before).abs().max()) > 1e-3
    consumer = context.linear(site.consumers[0])
    with torch.no_grad():
        consumer.weight /= factor[torch.tensor(site.producer.channel)]
    after = context.chain.run(context.chain.hidden[0])
    assert float((after - before).abs().max()) < 1e-4 * float(before.abs().max())


def test_close_when_inputs_were_captured_expect_files_removed_and_capture_to_start_afresh(
    shell: ModelShell, tokens: Tensor, tmp_path: Path
) -> None:
    context = open_block(shell, tokens, policy=StorePolicy(torch.device("cpu"), 0, 0, tmp_path))
    own: SiteContext = context.site(site_of(context, "norm"))
    idle = len(list(tmp_path.iterdir()))
    own.open()
    assert len(list(tmp_path.iterdir())) == idle + 1
    own.close()
    assert len(list(tmp_path.iterdir())) == idle
    assert next(own.chunks()).shape[1] == 256
    own.close()
    context.chain.close()


def test_report_when_steps_report_expect_figures_of_a_site_merged(shell: ModelShell, tokens: Tensor) -> None:
    context = open_block(shell, tokens)
    own = context.site(site_of(context, "norm"))
    own.report(first=1.0, second=2.0)
    own.report(second=3.0)
    assert context.figures == {own.site.name: {"first": 1.0, "second": 3.0}}
