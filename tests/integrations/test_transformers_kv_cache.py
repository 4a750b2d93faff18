"""A quantized cache behind transformers' interface: what attention sees, generation, and what is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from mergequant import ops
from mergequant.checkpoint import KV_MODULE
from mergequant.errors import InputError
from mergequant.integrations.transformers import QuantizedCache, kv_cache, load
from mergequant.integrations.transformers.kv_cache import QuantizedLayer
from mergequant.nn import KVScales, KVSpec
from mergequant.ops import kv_layout

IDS = torch.tensor([[1, 5, 9, 33, 4, 12, 7], [1, 8, 8, 41, 50, 3, 22]])
GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CASES = [("llama", None), ("llama", (1,)), ("llama_tied", (1, 8)), ("opt", (1,)), ("opt", None)]

Make = Callable[..., Any]


class RoundingCache(DynamicCache):
    """The same by other means: a float cache that rounds what it is given, but for the first `exempt` tokens."""

    def __init__(self, model: Any, bits: int, exempt: int) -> None:
        super().__init__(config=model.config)
        self.bits, self.exempt = bits, exempt
        self.scales = next(m for name, m in model.named_modules() if name.endswith("mergequant_kv"))

    def update(self, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        held = self.get_seq_length(layer)
        rounded = []
        for states, scale in zip((keys, values), self.scales.steps(layer, self.bits), strict=True):
            high = 2 ** (self.bits - 1) - 1
            codes = (states.float() * (1 / scale[:, None])).round().clamp(-high, high)
            late = torch.arange(states.shape[2])[:, None] + held >= self.exempt
            rounded.append(torch.where(late, (codes * scale[:, None]).to(states.dtype), states))
        return super().update(*rounded, layer, *args, **kwargs)


def prefix_length(prefix: tuple[int, ...] | None) -> int:
    return 0 if prefix is None else len(prefix)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("capacity", [None, 20])
@pytest.mark.parametrize(("family", "prefix"), CASES)
@torch.no_grad()
def test_forward_when_cache_is_quantized_equals_attention_to_rounded_states(
    family: str, prefix: tuple[int, ...] | None, capacity: int | None, bits: int, quantized: Make
) -> None:
    model, _ = quantized(family, prefix=prefix, kv=True)
    got = model(IDS, past_key_values=QuantizedCache.for_model(model, bits, capacity)).logits
    want = model(IDS, past_key_values=RoundingCache(model, bits, prefix_length(prefix))).logits
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    plain = model(IDS).logits
    deviation = float((got - plain).norm() / plain.norm())
    assert 0 < deviation < (0.25 if bits == 8 else 0.8)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("family", "prefix"), CASES)
@torch.no_grad()
def test_forward_when_tokens_come_one_by_one_gives_what_one_pass_gives(
    family: str, prefix: tuple[int, ...] | None, bits: int, quantized: Make
) -> None:
    """So one pass over a text measures the cache as generation uses it."""
    model, _ = quantized(family, prefix=prefix, kv=True)
    whole = model(IDS, past_key_values=QuantizedCache.for_model(model, bits)).logits
    for pieces in ([1] * 7, [3, 1, 3]):
        cache = QuantizedCache.for_model(model, bits, 16)
        parts = [model(part, past_key_values=cache).logits for part in IDS.split(pieces, 1)]
        # A BOS that is run alone shows the state after the whole prefix, which is the first column in no other case.
        difference = (torch.cat(parts, 1) - whole)[:, 1:]
        # The model's own 8-bit inputs make the last digit of a sum visible now and then.
        assert float(difference.norm() / whole.norm()) < 0.02
        assert cache.get_seq_length() == 7 + (prefix_length(prefix) or 1) - 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_generate_when_cache_is_quantized_goes_on_from_it(dtype: torch.dtype, quantized: Make) -> None:
    model, _ = quantized("llama", prefix=(1, 8), kv=True)
    model = model.to(dtype)
    grown = model.generate(IDS, past_key_values=QuantizedCache.for_model(model, 4), **GREEDY)
    fixed = model.generate(IDS, past_key_values=QuantizedCache.for_model(model, 4, 14), **GREEDY)
    assert torch.equal(grown, fixed)
    text = IDS
    for _ in range(6):
        logits = model(text, past_key_values=QuantizedCache.for_model(model, 4)).logits
        text = torch.cat([text, logits[:, -1:].argmax(-1)], 1)
    assert grown.shape == text.shape
    if dtype == torch.float32:
        assert torch.equal(grown, text)


@torch.no_grad()
def test_generate_when_rows_are_padded_or_beams_are_used_works(quantized: Make) -> None:
    model, _ = quantized("llama", prefix=(1,), kv=True)
    alone = model.generate(IDS[:1, :4], past_key_values=QuantizedCache.for_model(model, 8), **GREEDY)
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1, :4]], 1)
    both = torch.cat([ids, IDS[1:]])
    cache = QuantizedCache.for_model(model, 8)
    padded = model.generate(both, attention_mask=(both != 0).long(), past_key_values=cache, **GREEDY)
    assert torch.equal(padded[0, -6:], alone[0, -6:])
    beams = {**GREEDY, "num_beams": 3}
    got = model.generate(IDS, past_key_values=QuantizedCache.for_model(model, 8), **beams)
    want = model.generate(IDS, past_key_values=RoundingCache(model, 8, 1), **beams)
    assert torch.equal(got, want)


@torch.no_grad()
def test_cache_when_loaded_from_disk_gives_the_same_logits(saved: Make) -> None:
    model, folder = saved("llama_tied", prefix=(1,), kv=True)
    loaded = load(folder)
    results = [own(IDS, past_key_values=QuantizedCache.for_model(own, 4)).logits for own in (model, loaded)]
    assert torch.equal(*results)


@torch.no_grad()
def test_forward_when_keys_are_rotated_and_nothing_is_rounded_is_the_plain_model_in_float64(
    build: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = 12  # its rotation is not symmetric: the way back is another matrix
    rotation = ops.rotation(width)
    assert not torch.equal(rotation.matrix(), rotation.matrix().t())
    model = build("llama", head_dim=width).double()
    scales = KVScales(KVSpec(2, 2, width, width, rotation.name))
    scales.key_scale_4.copy_(torch.rand(2, 2, width, generator=torch.Generator().manual_seed(0)) + 0.1)
    model.model.add_module(KV_MODULE, scales)
    plain, own = DynamicCache(config=model.config), QuantizedCache.for_model(model, 4)
    want = model(IDS, past_key_values=plain).logits
    assert float((model(IDS, past_key_values=own).logits - want).norm() / want.norm()) > 1e-3

    monkeypatch.setattr(kv_layout, "quantize", lambda x, scale, bits: x / scale)
    for name in ("pack_codes", "unpack_codes"):
        monkeypatch.setattr(kv_cache, name, lambda codes, bits: codes)
    own = QuantizedCache.for_model(model, 4)
    got = torch.cat([model(part, past_key_values=own).logits for part in IDS.split([3, 1, 3], 1)], 1)
    assert float((got - want).abs().max() / want.abs().max()) <= 1e-10
    for number, layer in enumerate(own.layers):
        held = layer._halves[0].codes * scales.key_scale_4[number][:, None]
        keys = plain.layers[number].keys
        torch.testing.assert_close(held, keys @ rotation.matrix(), rtol=0, atol=1e-10)
        # What is held serves rotated queries as plain keys serve plain ones.
        queries = torch.randn(keys.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        products = (queries @ rotation.matrix()) @ held.mT
        torch.testing.assert_close(products, queries @ keys.mT, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_when_keys_are_rotated_rounds_them_in_the_rotated_basis(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(3, 2, 9, 12, generator=generator).to(dtype) for _ in range(2))
    scale = torch.rand(2, 12, generator=generator) / 4 + 0.2
    got = QuantizedLayer(scale, scale, 4, 2, rotates_keys=True).update(keys, values)
    matrix = ops.rotation(12).matrix().float()
    codes = ((keys.float() @ matrix) / scale[:, None]).round().clamp(-7, 7)
    want = torch.cat([keys[:, :, :2], ((codes * scale[:, None]) @ matrix.t()).to(dtype)[:, :, 2:]], 2)
    assert got[0].dtype == dtype
    assert torch.equal(got[0][:, :, :2], keys[:, :, :2])  # the prefix is not quantized
    torch.testing.assert_close(got[0], want, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
    assert torch.equal(got[1], QuantizedLayer(scale, scale, 4, 2).update(keys, values)[1])


def layer_of(bits: int, exempt: int = 2, capacity: int | None = None) -> QuantizedLayer:
    generator = torch.Generator().manual_seed(0)
    return QuantizedLayer(torch.rand(2, 4, generator=generator) + 0.1, torch.rand(2, 6) + 0.1, bits, exempt, capacity)


def states(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, tokens, 4, generator=generator), torch.randn(3, 2, tokens, 6, generator=generator)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("capacity", [None, 9])
def test_layer_when_filled_in_any_pieces_holds_the_same(bits: int, capacity: int | None) -> None:
    keys, values = states(9)
    whole = layer_of(bits)
    whole_keys, whole_values = whole.update(keys, values)
    assert torch.equal(whole_keys[:, :, :2], keys[:, :, :2])
    scale = layer_of(bits)._halves[0].scale
    inside = keys.abs() <= scale * (2 ** (bits - 1) - 1)
    late = inside[:, :, 2:]
    assert bool(((whole_keys - keys).abs()[:, :, 2:][late] <= (scale / 2).expand_as(keys)[:, :, 2:][late] + 1e-6).all())
    assert not torch.equal(whole_keys[:, :, 2:], keys[:, :, 2:])
    for cut in range(1, 9):
        pieces = copy.deepcopy(layer_of(bits, capacity=capacity))
        pieces._halves[1].scale = whole._halves[1].scale
        pieces.update(keys[:, :, :cut], values[:, :, :cut])
        got = pieces.update(keys[:, :, cut:], values[:, :, cut:])
        assert torch.equal(got[0], whole_keys)
        assert torch.equal(got[1], whole_values)
    half = whole._halves[0].codes
    assert half.element_size() == 1
    assert half.shape == (3, 2, 7, 4 * bits // 8)


@pytest.mark.parametrize("capacity", [None, 12])
@pytest.mark.parametrize("removed", [1, 7, 8, 9])
def test_layer_when_cropped_goes_on_as_if_never_filled(removed: int, capacity: int | None) -> None:
    keys, values = states(9)
    layer = layer_of(8, capacity=capacity)
    want = layer_of(8)
    want._halves[1].scale = layer._halves[1].scale
    layer.update(keys, values)
    layer.crop(-removed)
    assert layer.get_seq_length() == 9 - removed
    again = states(4, seed=1)
    if removed < 9:
        want.update(keys[:, :, : 9 - removed], values[:, :, : 9 - removed])
    for got, expected in zip(layer.update(*again), want.update(*again), strict=True):
        assert torch.equal(got, expected)
    layer.crop(3)  # as older releases of transformers: what is to stay
    assert layer.get_seq_length() == 3
    layer.crop(100)
    assert layer.get_seq_length() == 3


def test_layer_when_rows_are_picked_holds_those_rows() -> None:
    keys, values = states(5)
    order = torch.tensor([2, 0, 0])
    for act, picked in (
        (lambda layer: layer.reorder_cache(order), order),
        (lambda layer: layer.batch_select_indices(order[:2]), order[:2]),
        (lambda layer: layer.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
    ):
        layer = layer_of(4)
        act(layer)  # nothing to pick from yet
        before = layer.update(keys, values)[0]
        act(layer)
        after = layer.update(*(part[picked, :, :1] for part in (keys, values)))[0]
        assert torch.equal(after[:, :, :5], before[picked])


@torch.no_grad()
def test_cache_when_reset_can_be_used_again(quantized: Make) -> None:
    model, _ = quantized("llama", prefix=(1,), kv=True)
    cache = QuantizedCache.for_model(model, 8, capacity=7)
    first = model(IDS, past_key_values=cache).logits
    assert cache.get_max_length() == 7
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(model(IDS, past_key_values=cache).logits, first)


@torch.no_grad()
def test_cache_when_it_has_no_room_says_so(quantized: Make) -> None:
    for prefix, match in ((None, "room for 9 tokens, 10 are needed"), ((1, 8), "room for 9 tokens")):
        model, _ = quantized("llama", prefix=prefix, kv=True)
        with pytest.raises(InputError, match=match):
            model.generate(IDS, past_key_values=QuantizedCache.for_model(model, 8, capacity=9), **GREEDY)


def test_for_model_when_it_cannot_be_made_says_why(build: Make, quantized: Make) -> None:
    with pytest.raises(InputError, match=r"no steps for a quantized cache.*quantize it with this release"):
        QuantizedCache.for_model(build("llama"))
    model, _ = quantized("llama", kv=True)
    with pytest.raises(InputError, match="8 or 4 bits, not 16"):
        QuantizedCache.for_model(model, 16)
    with pytest.raises(InputError, match="room for 0 tokens"):
        QuantizedCache.for_model(model, 8, capacity=0)
