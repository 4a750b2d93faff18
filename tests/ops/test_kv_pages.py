"""kv_store, kv_page_attention and kv_page_read, torch references: against contiguous caches and plain attention."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kv_cases import Case, Paged, plain_attention
from mergequant.errors import KernelError
from mergequant.ops import kv_layout
from mergequant.ops.kv_attention import kv_attention
from mergequant.ops.kv_pages import kv_page_attention, kv_page_read, kv_store


def case(bits: int, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Case:
    sizes = {"batch": 3, "heads": 4, "key_heads": 2, "width": 64, "capacity": 256, "device": "cpu"}
    return Case(bits=bits, dtype=dtype, **(sizes | changes))


@pytest.mark.parametrize("page", [64, 128])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("lengths", [(256, 1, 33), (0, 64, 129)])
def test_page_attention_expect_plain_and_contiguous_attention(lengths: tuple[int, ...], bits: int, page: int) -> None:
    own = case(bits, torch.float32)
    arguments = own.attention_arguments(own.lengths(*lengths))
    out = torch.full_like(arguments["q"], float("nan"))
    kv_page_attention(**Paged(own, page).attention_arguments(arguments), out=out)
    exact = plain_attention(own, arguments)
    assert float((out.flatten(1).double() - exact).norm() / exact.norm()) < 1e-6
    assert torch.equal(out.flatten(1), kv_attention(**arguments))


@pytest.mark.parametrize("bits", [4, 8])
def test_page_attention_when_some_first_pages_are_marked_expect_the_stored_token_there(bits: int) -> None:
    own = case(bits)
    arguments = own.attention_arguments(own.lengths(200, 1, 77), prefix=1)
    paged = Paged(own, 64)
    pages = paged.attention_arguments(arguments)
    for marked in ((0, 1), (2,), ()):
        paged.mark(marked)
        arguments["key_cache"] = paged.rows(0).contiguous()
        plain = {name: value for name, value in arguments.items() if not name.startswith("prefix")}
        out = torch.empty_like(arguments["q"])
        kv_page_attention(**pages, out=out)
        for row in range(3):
            wanted = kv_attention(**(arguments if row in marked else plain))
            assert torch.equal(out[row].flatten(), wanted[row]), (row, marked)


def store_arguments(own: Case, paged: Paged, slots: Tensor) -> dict[str, Any]:
    shape = (slots.shape[0], own.key_heads, own.width)
    return {
        "key": own.normal(*shape) * 2,
        "value": own.normal(*shape) * 2,
        "slots": slots,
        "pages": paged.pages,
        "key_scale": own.key_scale,
        "value_scale": own.value_scale,
        "bits": own.bits,
    }


def codes_of(own: Case, pages: Tensor) -> list[Tensor]:
    """int8 (pages * page, key_heads, D) of keys and of values: one line for each slot."""
    take = (kv_layout.unpack_keys, kv_layout.unpack_values)
    return [unpack(pages[:, n], own.width, own.bits).transpose(1, 2).flatten(0, 1) for n, unpack in enumerate(take)]


@pytest.mark.parametrize("page", [64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_store_when_slots_are_random_expect_these_codes_and_no_others(bits: int, page: int) -> None:
    own = case(bits)
    paged = Paged(own, page)
    wanted = codes_of(own, paged.pages)
    for count in (1, 7, 90):
        slots = torch.randperm(wanted[0].shape[0], generator=own.generator)[:count]
        slots[:: 1 if count == 7 else 5] *= -1 if count == 7 else 1
        arguments = store_arguments(own, paged, slots)
        kept = slots >= 0
        kv_store(**arguments)
        for codes, name in zip(wanted, ("key", "value")):
            new = kv_layout.quantize(arguments[name].float(), arguments[f"{name}_scale"], bits)
            codes[slots[kept]] = new[kept]
    for got, codes in zip(codes_of(own, paged.pages), wanted):
        assert torch.equal(got, codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_store_expect_the_codes_that_a_contiguous_cache_gets(bits: int) -> None:
    own = case(bits)
    tokens = 70
    new = [own.normal(own.batch, own.key_heads, tokens, own.width) for _ in range(2)]
    caches = own.random_cache()
    slots = torch.arange(40, 40 + tokens).repeat(own.batch, 1)
    paged = Paged(own, 64)
    paged.fill(*caches)
    for cache, x, scale, keys in zip(caches, new, (own.key_scale, own.value_scale), (True, False)):
        codes = kv_layout.quantize(x.float(), scale[:, None], bits)
        kv_layout.put_codes(cache, codes, slots, bits, keys)
    given = store_arguments(own, paged, paged.slots(slots).flatten())
    given |= {name: x.transpose(1, 2).flatten(0, 1) for name, x in zip(("key", "value"), new)}
    kv_store(**given)
    for part, cache in enumerate(caches):
        assert torch.equal(paged.rows(part), cache)


@pytest.mark.parametrize("bits", [4, 8])
def test_store_when_a_first_token_is_the_stored_one_expect_a_mark_and_its_value(bits: int) -> None:
    own = case(bits)
    paged = Paged(own, 64)
    arguments = store_arguments(own, paged, torch.tensor([64, 65, 128, -1, 192]))
    stored = {f"prefix_{name}": own.normal(own.key_heads, 1, own.width) for name in ("key", "value")}
    for token in (0, 1, 3, 4):
        arguments["key"][token] = stored["prefix_key"][:, 0]
    arguments["key"][4, 1, 5] += 1  # one head is not the stored one
    before = arguments["value"].clone()
    kv_store(**arguments, **stored)
    assert kv_layout.is_marked(paged.pages[:5, 0], bits).tolist() == [[False] * 2, [True] * 2, *([[False] * 2] * 3)]
    assert torch.equal(arguments["value"][0], stored["prefix_value"][:, 0])
    assert torch.equal(arguments["value"][1:], before[1:])
    arguments["key"][0, 0, 0] += 1  # the page is used again
    kv_store(**arguments, **stored)
    assert not kv_layout.is_marked(paged.pages[:, 0], bits).any()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("prefix", [False, True])
def test_page_read_expect_old_tokens_decoded_and_fresh_ones_as_they_are(bits: int, prefix: bool) -> None:
    own = case(bits)
    paged = Paged(own, 64)
    caches = own.random_cache()
    paged.fill(*caches)
    paged.mark((0, 2))
    given = paged.read_arguments(past=(130, 64, 0), fresh=(3, 70, 5), prefix=prefix)
    kv_page_read(**given)
    k, v = kv_layout.unpack_keys(paged.rows(0), 64, bits), kv_layout.unpack_values(paged.rows(1), 64, bits)
    for x, scale, name in ((k, own.key_scale, "key"), (v, own.value_scale, "value")):
        parts = []
        for row, (past, start, stop) in enumerate(((130, 0, 3), (64, 3, 73), (0, 73, 78))):
            old = (x[row, :, :past].float() * scale[:, None]).bfloat16()
            if prefix and row == 0:
                old[:, :1] = given[f"prefix_{name}"]
            parts += [old.transpose(0, 1), given[name][start:stop]]
        assert torch.equal(given[f"out_{name}"][: 133 + 134 + 5], torch.cat(parts)), name


def test_page_ops_when_checked_by_torch_expect_a_sound_registration() -> None:
    own = case(4)
    paged = Paged(own, 64)
    attention = paged.attention_arguments(own.attention_arguments(own.lengths(1, 9, 128), prefix=1))
    for op, arguments in (
        (kv_store, store_arguments(own, paged, torch.arange(9))),
        (kv_page_attention, attention | {"out": torch.empty_like(attention["q"])}),
        (kv_page_read, paged.read_arguments(past=(9, 0, 3), fresh=(1, 2, 3), prefix=True)),
    ):
        torch.library.opcheck(op.overload, (), arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slots": torch.arange(3, dtype=torch.int32)}, "slots is torch.int32"),
        ({"slots": torch.tensor([0, 1, 1000000])}, "slot 1000000 lies behind"),
        ({"value": torch.zeros(3, 2, 32)}, "value is torch.float32"),
        ({"key_scale": torch.ones(2, 32)}, "key_scale"),
        ({"pages": torch.zeros(4, 2, 2, 32, 32, dtype=torch.uint8)}, "pages of 32 tokens"),
        ({"pages": torch.zeros(4, 2, 1, 64, 32, dtype=torch.uint8)}, "pages are"),
        ({"pages": torch.zeros(4, 2, 2, 64, 32, dtype=torch.int8)}, "torch.int8"),
        ({"bits": 16}, "not 16"),
        ({"prefix_key": torch.zeros(2, 1, 64)}, "go together"),
        ({"prefix_key": torch.zeros(2, 2, 64), "prefix_value": torch.zeros(2, 2, 64)}, "prefix_key must be"),
    ],
)
def test_store_when_an_argument_is_wrong_expect_error_that_names_it(changes: dict[str, Any], message: str) -> None:
    own = case(4)
    with pytest.raises(KernelError, match=message):
        kv_store(**(store_arguments(own, Paged(own, 64), torch.arange(3)) | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": torch.zeros(3, 4)}, "table is torch.float32"),
        ({"lengths": torch.tensor([1, 1, 999], dtype=torch.int32)}, "outside 0..256"),
        ({"out": torch.zeros(3, 4, 64)}, "out is torch.float32"),
        ({"most": 0}, "most is 0"),
        ({"q": torch.zeros(3, 3, 64)}, "no multiple of 2 key heads"),
    ],
)
def test_page_attention_when_an_argument_is_wrong_expect_error_that_names_it(
    changes: dict[str, Any], message: str
) -> None:
    own = case(4)
    arguments = Paged(own, 64).attention_arguments(own.attention_arguments(own.lengths(1, 9, 128)))
    with pytest.raises(KernelError, match=message):
        kv_page_attention(**(arguments | {"out": torch.empty_like(arguments["q"])} | changes))
