"""The chain carries hidden states through the model exactly as the model itself would."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from families import FAMILIES, make_model
from mergequant.assets import TINY
from mergequant.calibration import Chain, Chunk, StorePolicy, check_finite, chunked
from mergequant.errors import NumericsError, StructureError
from mergequant.models import ModelShell

POLICY = StorePolicy(torch.device("cpu"))
SPILLING = StorePolicy(torch.device("cpu"), memory_bytes=0)


def run_all(chain: Chain) -> None:
    """All blocks with their float weights."""
    for index in range(len(chain.shell.blocks)):
        chain.shell.load_block(index)
        chain.begin_block()
        chain.advance()
        chain.shell.release_block(index)


@pytest.fixture(scope="module")
def tiny() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("policy", [POLICY, SPILLING], ids=["memory", "disk"])
def test_chain_when_blocks_stay_float_expect_the_models_own_logits_exactly(
    shell: ModelShell, tiny: PreTrainedModel, tokens: Tensor, policy: StorePolicy
) -> None:
    chunks = [Chunk(tokens[:2], "calibration"), Chunk(tokens[2:4], "held_out"), Chunk(tokens[4:], "verify")]
    chain = Chain(shell, chunks, policy, None)
    run_all(chain)
    for number, chunk in enumerate(chunks):
        assert torch.equal(chain.logits(number), logits(tiny, chunk.tokens))
    chain.close()


def test_chain_when_prefix_is_bos_expect_the_plain_models_logits_after_it(
    shell: ModelShell, tiny: PreTrainedModel, tokens: Tensor
) -> None:
    chain = Chain(shell, [Chunk(tokens[:3], "calibration"), Chunk(tokens[3:], "verify")], POLICY, ([1], True))
    assert chain.hidden[0].shape == (3, 19, 256)  # BOS is not run again
    run_all(chain)
    for number, part in enumerate((tokens[:3], tokens[3:])):
        plain = logits(tiny, part)
        result = chain.logits(number)
        assert result.shape == plain[:, 1:].shape
        assert float((result - plain[:, 1:]).abs().max()) < 1e-4
    with torch.no_grad():
        expected = tiny.model(torch.tensor([[1]])).last_hidden_state[0]
    torch.testing.assert_close(chain.prefix_output(), expected, rtol=1e-5, atol=1e-5)


def test_chain_when_prefix_does_not_stand_for_bos_expect_logits_of_prefix_and_window(
    shell: ModelShell, tiny: PreTrainedModel, tokens: Tensor
) -> None:
    chain = Chain(shell, [Chunk(tokens, "calibration")], POLICY, ([1, 77], False))
    run_all(chain)
    plain = logits(tiny, torch.cat([torch.tensor([[1, 77]]).expand(5, -1), tokens], 1))
    assert chain.logits(0).shape == (5, 20, 8192)
    assert float((chain.logits(0) - plain[:, 2:]).abs().max()) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", [None, ([1], True)], ids=["plain", "prefix"])
def test_chain_when_any_family_expect_the_models_own_logits(family: str, prefix: tuple[list[int], bool] | None) -> None:
    model = make_model(family)
    tokens = torch.randint(3, 97, (3, 14), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 1
    chain = Chain(ModelShell.open(model), [Chunk(tokens, "calibration")], POLICY, prefix)
    run_all(chain)
    expected = logits(model, tokens)[:, 0 if prefix is None else 1 :]
    assert float((chain.logits(0) - expected).abs().max() / expected.abs().max()) < 1e-5


def test_begin_block_when_prefix_runs_expect_the_keys_and_values_of_the_models_cache(
    shell: ModelShell, tiny: PreTrainedModel, tokens: Tensor
) -> None:
    cache = DynamicCache(config=tiny.config)
    with torch.no_grad():
        tiny(torch.tensor([[1, 9]]), past_key_values=cache)
    chain = Chain(shell, [Chunk(tokens[:1], "calibration")], POLICY, ([1, 9], True))
    for index in range(2):
        shell.load_block(index)
        chain.begin_block()
        assert chain.prefix is not None
        torch.testing.assert_close(chain.prefix.keys, cache.layers[index].keys)
        torch.testing.assert_close(chain.prefix.values, cache.layers[index].values)
        chain.advance()


def test_run_when_called_twice_with_a_prefix_expect_the_same_output(shell: ModelShell, tokens: Tensor) -> None:
    chain = Chain(shell, [Chunk(tokens, "calibration")], POLICY, ([1], True))
    shell.load_block(0)
    chain.begin_block()
    assert torch.equal(chain.run(chain.hidden[0]), chain.run(chain.hidden[0]))  # the cache does not grow


def test_prefix_output_when_there_is_no_prefix_expect_error(shell: ModelShell, tokens: Tensor) -> None:
    with pytest.raises(StructureError, match="without a prefix"):
        Chain(shell, [Chunk(tokens, "calibration")], POLICY, None).prefix_output()


def test_advance_when_a_value_overflows_expect_error_that_names_block_and_channel(
    shell: ModelShell, tokens: Tensor
) -> None:
    chain = Chain(shell, [Chunk(tokens, "calibration")], POLICY, None)
    block = shell.load_block(0)
    chain.advance()
    block = shell.load_block(1)
    with torch.no_grad():
        block.mlp.down_proj.weight[17] = float("inf")
    with pytest.raises(NumericsError, match=r"model\.layers\.1.*channel 17"):
        chain.advance()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_check_finite_when_one_value_is_not_expect_error_that_names_the_channel(value: float) -> None:
    tensor = torch.zeros(2, 3, 9)
    check_finite(tensor, "x")
    tensor[1, 2, 6] = value
    with pytest.raises(NumericsError, match=r"somewhere.*channel 6"):
        check_finite(tensor, "somewhere")


@pytest.mark.parametrize(("count", "length", "sizes"), [(5, 2048, [2, 2, 1]), (3, 5000, [1, 1, 1]), (7, 16, [7])])
def test_chunked_when_windows_are_cut_expect_about_4096_tokens_each(count: int, length: int, sizes: list[int]) -> None:
    windows = torch.arange(count * length).reshape(count, length)
    chunks = list(chunked(windows, "held_out"))
    assert [len(chunk.tokens) for chunk in chunks] == sizes
    assert torch.equal(torch.cat([chunk.tokens for chunk in chunks]), windows)
    assert {chunk.role for chunk in chunks} == {"held_out"}


def test_numbers_when_chunks_have_roles_expect_their_positions(shell: ModelShell, tokens: Tensor) -> None:
    chunks = [Chunk(tokens[:1], "calibration"), Chunk(tokens[1:2], "verify"), Chunk(tokens[2:3], "calibration")]
    chain = Chain(shell, chunks, POLICY, None)
    assert (chain.numbers("calibration"), chain.numbers("verify"), chain.numbers("held_out")) == ([0, 2], [1], [])


def test_chain_when_hidden_states_spill_expect_files_removed_on_close(
    shell: ModelShell, tokens: Tensor, tmp_path: Path
) -> None:
    chain = Chain(shell, [Chunk(tokens, "calibration")], StorePolicy(POLICY.device, 0, 0, tmp_path), None)
    assert any(tmp_path.iterdir())
    chain.close()
    assert not any(tmp_path.iterdir())
