"""Prompts served behind a stored prefix: exact where the prefix is the prompt's own BOS, consistent everywhere."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, PreTrainedModel, StaticCache

from mergequant.errors import InputError, StructureError
from mergequant.integrations.transformers import install_prefix

IDS = torch.tensor([[1, 5, 9, 33, 4, 12, 7], [1, 8, 8, 41, 50, 3, 22]])
SHORT = torch.tensor([[1, 17, 30, 6]])
# (tokens, replaces_bos): the prompt's own BOS, BOS and a separator, a separator before a prompt that keeps its BOS.
PREFIXES = [((1,), True), ((1, 8), True), ((8, 3), False)]


def _padded(side: str) -> tuple[Tensor, Tensor]:
    """IDS and SHORT and a lone BOS in one batch of 7 columns."""
    rows = [IDS[0], IDS[1], SHORT[0], torch.tensor([1])]
    ids, mask = torch.zeros(4, 7, dtype=torch.long), torch.zeros(4, 7, dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(7 - len(tokens), None) if side == "left" else slice(len(tokens))
        ids[row, place], mask[row, place] = tokens, 1
    return ids, mask


def _served(build: Callable[..., Any], store_of: Callable[..., Any], family: str = "llama", **prefix: Any) -> Any:
    """A float model in float64, the same served behind a prefix of its own."""
    plain = build(family).double()
    served = copy.deepcopy(plain)
    install_prefix(served, store_of(plain, **prefix))
    return plain, served


def _with_explicit_prefix(plain: PreTrainedModel, ids: Tensor, tokens: tuple[int, ...], replaces_bos: bool) -> Tensor:
    """Last logits of prompts of one length, by running the prefix's tokens in front of them without any cache."""
    rest = ids[:, 1:] if replaces_bos else ids
    whole = torch.cat([torch.tensor([tokens]).expand(len(ids), -1), rest], 1)
    return plain(whole, use_cache=False).logits[:, -1]


@pytest.mark.parametrize("family", ["llama", "llama_tied", "opt"])
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_forward_when_prefix_is_bos_equals_plain_model(
    family: str, use_cache: bool, build: Callable[..., Any], store_of: Callable[..., Any]
) -> None:
    plain, served = _served(build, store_of, family)
    out = served(IDS, use_cache=use_cache)
    torch.testing.assert_close(out.logits, plain(IDS).logits, rtol=1e-10, atol=1e-10)
    assert (out.past_key_values is not None) == use_cache


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_forward_when_batch_is_padded_equals_single_prompts(
    family: str, side: str, build: Callable[..., Any], store_of: Callable[..., Any]
) -> None:
    plain, served = _served(build, store_of, family)
    ids, mask = _padded(side)
    logits = served(ids, attention_mask=mask).logits
    assert logits.shape == (*ids.shape, plain.config.vocab_size)
    for row in range(4):
        alone = plain(ids[row][mask[row].bool()][None]).logits[0]
        torch.testing.assert_close(logits[row][mask[row].bool()], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("tokens", "replaces_bos"), PREFIXES)
@pytest.mark.parametrize("family", ["llama", "opt"])
@torch.no_grad()
def test_forward_when_prefix_is_longer_equals_prefix_run_in_front(
    family: str, tokens: tuple[int, ...], replaces_bos: bool, build: Callable[..., Any], store_of: Callable[..., Any]
) -> None:
    plain, served = _served(build, store_of, family, tokens=tokens, replaces_bos=replaces_bos)
    ids, mask = _padded("left")
    last = served(ids, attention_mask=mask).logits[:, -1]
    for row in range(4):
        alone = ids[row][mask[row].bool()][None]
        want = _with_explicit_prefix(plain, alone, tokens, replaces_bos)[0]
        torch.testing.assert_close(last[row], want, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(served(alone).logits[0, -1], want, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_forward_when_prefix_goes_on_after_bos_shows_the_bos_state(
    build: Callable[..., Any], store_of: Callable[..., Any]
) -> None:
    plain, served = _served(build, store_of, tokens=(1, 8))
    bos = plain(torch.tensor([[1]])).logits[0, 0]
    torch.testing.assert_close(served(IDS).logits[:, 0], bos.expand(2, -1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("tokens", "replaces_bos"), PREFIXES)
@torch.no_grad()
def test_forward_when_prompt_comes_in_pieces_equals_one_call(
    tokens: tuple[int, ...], replaces_bos: bool, build: Callable[..., Any], store_of: Callable[..., Any]
) -> None:
    _, served = _served(build, store_of, tokens=tokens, replaces_bos=replaces_bos)
    whole = served(IDS).logits
    cache, pieces = DynamicCache(config=served.config), []
    for start, stop in ((0, 1), (1, 4), (4, 7)):
        mask = torch.ones(2, stop, dtype=torch.long) if start == 4 else None
        pieces.append(served(IDS[:, start:stop], past_key_values=cache, attention_mask=mask).logits)
    torch.testing.assert_close(torch.cat(pieces[1:], 1), whole[:, 1:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("tokens", "replaces_bos"), PREFIXES)
@pytest.mark.parametrize("family", ["llama", "opt"])
@torch.no_grad()
def test_generate_when_padded_or_static_gives_tokens_of_the_reference_loop(
    family: str, tokens: tuple[int, ...], replaces_bos: bool, build: Callable[..., Any], store_of: Callable[..., Any]
) -> None:
    plain = build(family)
    served = copy.deepcopy(plain)
    install_prefix(served, store_of(plain, tokens=tokens, replaces_bos=replaces_bos))
    ids, mask = _padded("left")
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    reference = []
    for row in range(4):
        text = ids[row][mask[row].bool()][None]
        for _ in range(6):
            text = torch.cat([text, _with_explicit_prefix(plain, text, tokens, replaces_bos).argmax(-1)[:, None]], 1)
        reference.append(text[0, -6:])
        assert torch.equal(served.generate(text[:, :-6], **options)[0], text[0])
        assert torch.equal(served.generate(text[:, :-6], use_cache=False, **options)[0], text[0])
    want = torch.stack(reference)
    assert torch.equal(served.generate(ids, attention_mask=mask, **options)[:, 7:], want)
    cache = StaticCache(config=served.config, max_cache_len=20)
    assert torch.equal(served.generate(ids, attention_mask=mask, past_key_values=cache, **options)[:, 7:], want)
    if len(tokens) == replaces_bos:  # as long as the prompt says: `generate` sizes the cache itself
        static = served.generate(ids, attention_mask=mask, cache_implementation="static", **options)
        assert torch.equal(static[:, 7:], want)


@torch.no_grad()
def test_generate_when_beams_are_used_equals_plain_model(
    build: Callable[..., Any], store_of: Callable[..., Any]
) -> None:
    plain = build("llama")
    served = copy.deepcopy(plain)
    install_prefix(served, store_of(plain))
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(served.generate(IDS, **options), plain.generate(IDS, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("family", "tokens"), [("llama", (1, 8)), ("opt", (1,))])
@torch.no_grad()
def test_generate_when_quantized_serves_both_caches_in_all_dtypes(
    dtype: torch.dtype, family: str, tokens: tuple[int, ...], quantized: Callable[..., Any]
) -> None:
    model, _ = quantized(family, prefix=tokens)
    model = model.to(dtype)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    dynamic = model.generate(IDS, **options)
    cache = StaticCache(config=model.config, max_cache_len=20)
    static = model.generate(IDS, past_key_values=cache, **options)
    assert static.shape == dynamic.shape == (2, 12)
    if dtype == torch.float32:
        assert torch.equal(static, dynamic)
    else:  # attention over a longer, masked buffer may round differently in 16 bits; tokens of near ties then differ
        logits = [
            model(IDS, past_key_values=c).logits for c in (None, StaticCache(config=model.config, max_cache_len=20))
        ]
        assert (logits[0] - logits[1]).norm() < 0.15 * logits[0].norm()
    assert model.model.get_submodule("decoder" if family == "opt" else "").mergequant_prefix.keys.dtype == torch.float32


@torch.no_grad()
def test_install_prefix_when_repeated_or_copied_serves_once_and_apart(
    build: Callable[..., Any], store_of: Callable[..., Any]
) -> None:
    plain, served = _served(build, store_of)
    install_prefix(served, served.model.mergequant_prefix)
    twin = copy.deepcopy(served)
    served.model.embed_tokens.weight.zero_()
    served.model.mergequant_prefix.keys.zero_()
    torch.testing.assert_close(twin(IDS).logits, plain(IDS).logits, rtol=1e-10, atol=1e-10)


def test_install_prefix_when_blocks_do_not_fit_refuses(build: Callable[..., Any], store_of: Callable[..., Any]) -> None:
    with pytest.raises(StructureError, match="2 equal blocks"):
        install_prefix(build("llama", num_hidden_layers=3), store_of(build("llama")))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"input_ids": IDS[:, 1:]}, r"row 0 begins with token 5 instead of BOS \(1\)"),
        ({"input_ids": IDS[:, :0]}, "prompt is empty"),
        ({"input_ids": IDS, "attention_mask": torch.zeros(2, 7)}, "row 0 is all padding"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 7, 7)}, "4-D"),
        ({"input_ids": IDS, "attention_mask": {"full_attention": None}}, "dict"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 9)}, "covers 9 tokens"),
        ({"inputs_embeds": torch.zeros(2, 7, 32)}, "pass input_ids"),
        ({"input_ids": IDS, "output_hidden_states": True}, "BOS alone first"),
    ],
)
@torch.no_grad()
def test_forward_when_call_cannot_be_served_says_why(
    arguments: dict[str, Any], match: str, build: Callable[..., Any], store_of: Callable[..., Any]
) -> None:
    plain = build("llama")
    install_prefix(plain, store_of(plain))
    with pytest.raises(InputError, match=match):
        plain(**arguments)


@torch.no_grad()
def test_forward_when_padding_exceeds_sliding_window_refuses(store_of: Callable[..., Any]) -> None:
    settings = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4}
    plain = MistralForCausalLM(
        MistralConfig(vocab_size=61, num_key_value_heads=2, sliding_window=6, **settings)
    ).double()
    served = copy.deepcopy(plain)
    install_prefix(served, store_of(plain))
    torch.testing.assert_close(served(IDS).logits, plain(IDS).logits, rtol=1e-10, atol=1e-10)
    ids, mask = _padded("left")
    with pytest.raises(InputError, match="sliding window of 6 tokens"):
        served(ids, attention_mask=mask)


@torch.no_grad()
def test_generate_when_static_cache_has_no_room_refuses(
    build: Callable[..., Any], store_of: Callable[..., Any]
) -> None:
    plain = build("llama")
    install_prefix(plain, store_of(plain, tokens=(1, 8, 9)))
    with pytest.raises(InputError, match="room for 10 tokens"):
        plain.generate(IDS, cache_implementation="static", max_new_tokens=4, do_sample=False, eos_token_id=None)


@torch.no_grad()
def test_forward_when_hidden_states_are_asked_for_after_bos_gives_them(
    build: Callable[..., Any], store_of: Callable[..., Any]
) -> None:
    plain, served = _served(build, store_of)
    cache = served(IDS[:, :1]).past_key_values
    got = served(IDS[:, 1:], past_key_values=cache, output_hidden_states=True).hidden_states
    want = plain(IDS, output_hidden_states=True).hidden_states
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs[:, 1:], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_forward_when_tuple_is_asked_for_gives_tuple(build: Callable[..., Any], store_of: Callable[..., Any]) -> None:
    plain, served = _served(build, store_of)
    torch.testing.assert_close(
        served.model(IDS, return_dict=False)[0], plain.model(IDS).last_hidden_state, rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(served.model(IDS, torch.ones(2, 7))[0], plain.model(IDS)[0], rtol=1e-10, atol=1e-10)
