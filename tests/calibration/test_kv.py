"""What a block puts into a cache is seen as it is: after rotary embedding, without the prefix."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention

from families import FAMILIES, make_model
from mergequant.assets import TINY
from mergequant.calibration import Chain, Chunk, StorePolicy, record_kv
from mergequant.errors import NumericsError
from mergequant.models import ModelShell

POLICY = StorePolicy(torch.device("cpu"))


@torch.no_grad()
def cached(model: PreTrainedModel, tokens: Tensor, layer: int, skip: int) -> tuple[Tensor, ...]:
    """Keys and values of the model's own cache as (tokens, heads, width), the first columns left out."""
    cache = DynamicCache()  # without a config no layer forgets what slides out of its window
    model(tokens, past_key_values=cache)
    held = cache.layers[layer]
    return tuple(part[:, :, skip:].transpose(1, 2).flatten(0, 1) for part in (held.keys, held.values))


def windows() -> Tensor:
    tokens = torch.randint(3, 97, (5, 14), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 1
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", [None, ([1], True)], ids=["plain", "prefix"])
def test_record_kv_when_any_family_expect_the_models_own_keys_and_values(
    family: str, prefix: tuple[list[int], bool] | None
) -> None:
    model, tokens = make_model(family), windows()
    chunks = [Chunk(tokens[:2], "calibration"), Chunk(tokens[2:4], "calibration"), Chunk(tokens[4:], "held_out")]
    chain = Chain(ModelShell.open(model), chunks, POLICY, prefix)
    skip = 0 if prefix is None else 1
    for layer in range(2):
        chain.shell.load_block(layer)
        chain.begin_block()
        for role, rows in (("calibration", slice(4)), ("held_out", slice(4, 5))):
            want = cached(model, tokens[rows], layer, skip)
            got = record_kv(chain, role, 1000)  # type: ignore[arg-type]
            assert got is not None
            for own, expected in zip(got, want, strict=True):
                assert own.shape == expected.shape
                assert float((own - expected).abs().max() / expected.abs().max()) < 1e-5
        chain.advance()


def test_record_kv_when_tokens_are_limited_runs_no_more_chunks() -> None:
    model, tokens = make_model("llama"), windows()
    chain = Chain(ModelShell.open(model), [Chunk(tokens[i : i + 1], "calibration") for i in range(5)], POLICY, None)
    chain.shell.load_block(0)
    runs = []
    real = chain.shell.run_block
    chain.shell.run_block = lambda *args: (runs.append(1), real(*args))[1]  # type: ignore[method-assign]
    got = record_kv(chain, "calibration", 20)
    assert got is not None
    assert len(runs) == 2
    assert got[0].shape == (20, 2, 10)
    assert torch.equal(got[0], cached(model, tokens[:2], 0, 0)[0][:20])
    assert record_kv(chain, "held_out", 20) is None


def test_record_kv_when_run_leaves_chain_as_it_was() -> None:
    tokens = torch.randint(3, 8192, (2, 20), generator=torch.Generator().manual_seed(0))
    tiny = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    chain = Chain(ModelShell.open(TINY), [Chunk(tokens, "calibration")], POLICY, None)
    for layer in range(len(chain.shell.blocks)):
        chain.shell.load_block(layer)
        assert record_kv(chain, "calibration", 100) is not None
        chain.advance()
    with torch.no_grad():
        assert torch.equal(chain.logits(0), tiny(tokens).logits)


def _forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that takes a cache and does not use it."""
    real = LlamaAttention.forward

    def forward(self: nn.Module, *args: object, past_key_values: object = None, **kwargs: object) -> object:
        return real(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(LlamaAttention, "forward", forward)


def test_record_kv_when_block_keeps_nothing_expect_none(monkeypatch: pytest.MonkeyPatch) -> None:
    _forgets(monkeypatch)
    chain = Chain(ModelShell.open(make_model("llama")), [Chunk(windows(), "calibration")], POLICY, None)
    chain.shell.load_block(0)
    assert record_kv(chain, "calibration", 100) is None


def test_record_kv_when_block_is_given_no_cache_expect_none(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = Chain(ModelShell.open(make_model("llama")), [Chunk(windows(), "calibration")], POLICY, None)
    chain.shell.load_block(0)
    real = chain.shell.block_kwargs

    def without(*args: object, **kwargs: object) -> object:
        entering, calls = real(*args, **kwargs)  # type: ignore[arg-type]
        return entering, [{name: None if "past" in name else value for name, value in call.items()} for call in calls]

    monkeypatch.setattr(chain.shell, "block_kwargs", without)
    assert record_kv(chain, "calibration", 100) is None


def test_record_kv_when_a_value_overflows_expect_error_that_names_it() -> None:
    chain = Chain(ModelShell.open(make_model("llama")), [Chunk(windows(), "calibration")], POLICY, None)
    block = chain.shell.load_block(0)
    with torch.no_grad():
        block.self_attn.v_proj.weight[3] = float("inf")
    with pytest.raises(NumericsError, match=r"model\.layers\.0: value.*channel 3"):
        record_kv(chain, "calibration", 100)
