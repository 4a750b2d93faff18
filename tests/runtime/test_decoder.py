"""Prefill and steps agree with each other, whatever the way in which a text is cut."""

from collections.abc import Callable

import pytest
import torch

from mergequant.errors import InputError, UsageError
from mergequant.runtime import Decoder, DecoderShape, KVCache, random_decoder

TOKENS = torch.randint(0, 61, (3, 20), generator=torch.Generator().manual_seed(0))


def close(got: torch.Tensor, want: torch.Tensor, limit: float) -> None:
    """Relative to the spread of the logits: ties in rounding may move a code or two."""
    deviation = float((got - want).norm() / (want - want.mean(-1, keepdim=True)).norm())
    assert deviation < limit, deviation


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_steps_when_cache_is_float_continue_like_one_prefill(decoder: Callable[..., Decoder], prefix: int) -> None:
    made = decoder(prefix=prefix)
    cache = made.new_cache(3, 40)
    logits = made.prefill(TOKENS[:, :12], cache)
    for place in range(12, 20):
        close(logits, made.prefill(TOKENS[:, :place], made.new_cache(3, 40)), 0.03)
        logits = made.step(TOKENS[:, place], cache)
    assert cache.lengths.tolist() == [20 + prefix] * 3


@pytest.mark.parametrize(("kv_bits", "limit"), [(8, 0.06), (4, 0.5)])
@pytest.mark.parametrize("prefix", [0, 2])
def test_steps_when_cache_is_quantized_are_close(
    decoder: Callable[..., Decoder], kv_bits: int, limit: float, prefix: int
) -> None:
    exact, quantized = decoder(prefix=prefix), decoder(kv_bits=kv_bits, prefix=prefix)
    logits = []
    for made in (exact, quantized):
        cache = made.new_cache(3, 40)
        made.prefill(TOKENS[:, :12], cache)
        logits.append(torch.stack([made.step(TOKENS[:, place], cache) for place in range(12, 20)]))
    close(logits[1], logits[0], limit)
    assert not torch.equal(logits[1], logits[0])


@pytest.mark.parametrize("prefix", [0, 2])
def test_prefill_when_rows_are_padded_ignores_padding(decoder: Callable[..., Decoder], prefix: int) -> None:
    made = decoder(prefix=prefix)
    counts = torch.tensor([20, 7, 1])
    cache = made.new_cache(3, 40)
    logits = [made.prefill(TOKENS, cache, counts), made.step(TOKENS[:, 0], cache)]
    for row, count in enumerate(counts.tolist()):
        alone = made.new_cache(1, 40)
        close(logits[0][row], made.prefill(TOKENS[row : row + 1, :count], alone)[0], 0.03)
        close(logits[1][row], made.step(TOKENS[row : row + 1, 0], alone)[0], 0.03)
    assert (cache.lengths - 1 - prefix).tolist() == counts.tolist()


@pytest.mark.parametrize("prefix", [0, 2])
def test_prefill_when_cut_in_pieces_equals_one(decoder: Callable[..., Decoder], prefix: int) -> None:
    made = decoder(prefix=prefix)
    whole = made.prefill(TOKENS, made.new_cache(3, 40))
    cache = made.new_cache(3, 40)
    for begin, end in ((0, 5), (5, 6), (6, 20)):
        logits = made.prefill(TOKENS[:, begin:end], cache, past=prefix + begin if begin else None)
    close(logits, whole, 0.03)


def test_prefill_when_room_is_missing_refuses(decoder: Callable[..., Decoder]) -> None:
    made = decoder()
    with pytest.raises(InputError, match="64 slots"):
        made.prefill(TOKENS.repeat(1, 4), made.new_cache(3, 10))
    with pytest.raises(UsageError, match="multiples of 64"):
        KVCache.allocate(1, 1, 1, 32, 65, made.kv, torch.float32)
    with pytest.raises(InputError, match="no stored prefix"):
        made.logits_of_prefix()


@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"qkv_bias": True, "kv_heads": 4}])
def test_random_decoder_is_finite_and_codes_spread(
    weight_bits: int, changes: dict[str, int], shape: DecoderShape
) -> None:
    from dataclasses import replace

    made = random_decoder(replace(shape, **changes), "cpu", weight_bits=weight_bits, dtype=torch.float32)
    tokens = torch.arange(48)[None]
    logits = made.prefill(tokens, made.new_cache(1, 64))
    assert bool(torch.isfinite(logits).all())
    assert 0.3 < float(logits.std()) < 30
    x = torch.nn.functional.embedding(tokens, made.embedding)
    layer = made.layers[0]
    codes = layer.mlp_norm(None, x)
    product = layer.mlp.gate_up(codes)  # type: ignore[arg-type]
    for spread in (codes, product):
        assert 10 < float(spread.float().std()) < 80
        assert float((spread.abs() == 127).float().mean()) < 0.1


def test_random_decoder_when_bits_are_unknown_refuses(shape: DecoderShape) -> None:
    with pytest.raises(UsageError, match="choose 4 or 8"):
        random_decoder(shape, "cpu", weight_bits=3)
    with pytest.raises(UsageError, match="choose one of"):
        random_decoder(shape, "cpu", kv_bits=2)


@pytest.mark.parametrize("wrong", [{"layers": 0}, {"kv_heads": 3}, {"head_width": 33}])
def test_shape_when_impossible_refuses(shape: DecoderShape, wrong: dict[str, int]) -> None:
    from dataclasses import replace

    with pytest.raises(UsageError):
        replace(shape, **wrong)
