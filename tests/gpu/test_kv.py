"""Cache kernels on a GPU: both backends against the torch reference, over contexts, groups, widths, bits and prefixes.

The reference itself is proven on a CPU (tests/ops/test_kv_*.py). Every failure names its case and the worst element.
"""

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from kv_cases import Case, Paged, decoded
from mergequant.ops import kv_layout
from mergequant.ops.backends import reason_against, use_backend
from mergequant.ops.kv_append import kv_append
from mergequant.ops.kv_attention import kv_attention, kv_read
from mergequant.ops.kv_pages import kv_page_attention, kv_page_read, kv_store
from mergequant.ops.overlap import overlapping

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with CUDA"),
]

CONTEXTS = (1, 5, 31, 32, 33, 64, 77, 1000, 2048, 4096)
FEW_CONTEXTS = (1, 33, 77, 2048)
HEADS = ((1, 1), (2, 1), (4, 1), (8, 1), (32, 32), (32, 8))
TOLERANCE = 3e-3  # bfloat16 rounds the result by up to 2e-3 of each element
BACKENDS = ("cuda", "triton")


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Compile the variants of the CUDA kernels side by side."""
    if not torch.cuda.is_available() or without("cuda"):
        return
    from mergequant.ops.cuda import kv, kv_pages, launch

    units = []
    for width in (64, 128):
        for bits in (4, 8):
            for group in (1, 2, 4, 8):
                units += [(kv.append_unit(width, group, bits, torch.bfloat16, one), kv.APPEND) for one in (True, False)]
                for prefix in (False, True):
                    for warps, resident in {
                        (d.warps, d.resident) for d in kv.configurations(width, group, bits, prefix)
                    }:
                        unit = kv.attention_unit(width, group, bits, torch.bfloat16, prefix, warps, resident)
                        units.append((unit, kv.ATTENTION))
                    for warps in kv.WARP_CHOICES:
                        own = (width, group, bits, torch.bfloat16, prefix, warps, kv.FEW_WARPS, True)
                        units.append((kv.attention_unit(*own), kv.ATTENTION))
            for stored, tokens in product((False, True), (kv_pages.FEW_TOKENS, kv_pages.MANY_TOKENS)):
                units.append((kv_pages.store_unit(width, bits, torch.bfloat16, stored, tokens), kv_pages.STORE))
    launch.prepare(units, torch.device("cuda", torch.cuda.current_device()))


def without(backend: str) -> str | None:
    major, minor = torch.cuda.get_device_capability()
    return reason_against("kv_attention", backend, f"sm_{major}{minor}")


def needs(backend: str) -> None:
    reason = without(backend)
    if reason:
        pytest.skip(reason)


def worst(name: str, got: Tensor, want: Tensor) -> str:
    """The case, its relative error, and its worst element, for the message of an assertion."""
    difference = (got.double() - want.double()).abs().nan_to_num(math.inf)
    place = int(difference.argmax())
    index = torch.unravel_index(torch.tensor(place), difference.shape)
    return (
        f"{name}: {int((difference > 0).sum())} of {difference.numel()} differ; worst at {[int(i) for i in index]}: "
        f"{got.flatten()[place].item()} instead of {want.flatten()[place].item()}"
    )


def relative(got: Tensor, want: Tensor) -> float:
    error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
    return math.inf if math.isnan(error) else error


def ragged(own: Case, context: int) -> Tensor:
    """The first row has the whole context, the last of several has nothing, the others something."""
    lengths = torch.randint(0, context + 1, (own.batch,), generator=own.generator)
    lengths[0] = context
    if own.batch > 2:
        lengths[-1] = 0
    return own.lengths(*lengths.tolist())


def case_of(context: int, batch: int, heads: tuple[int, int], width: int, bits: int, **changes: Any) -> Case:
    capacity = -(-context // 64) * 64 + 64
    chosen = {"dtype": torch.bfloat16, "device": "cuda", "seed": context + batch} | changes
    return Case(batch, heads[0], heads[1], width, bits, capacity, **chosen)


def attention_cases() -> list[tuple[str, tuple[int, int], int, int, int]]:
    """Backend, heads, width, bits, prefix. Triton compiles every variant for seconds, so it has fewer of them."""
    cuda = product(("cuda",), HEADS, (64, 128), (4, 8), (0, 1, 3))
    floats = product(("triton",), ((1, 1), (8, 1), (32, 8)), (64, 128), (16,), (0, 3))
    codes = product(("triton",), ((8, 1),), (64, 128), (4, 8), (0, 3))
    return [*cuda, *floats, *codes]


@pytest.mark.parametrize(("backend", "heads", "width", "bits", "prefix"), attention_cases(), ids=str)
def test_attention_expect_float64_of_the_decoded_cache(
    backend: str, heads: tuple[int, int], width: int, bits: int, prefix: int
) -> None:
    needs(backend)
    batches = (1, 3, 16) if heads[0] <= 8 else (1, 3)
    failures = []
    for context in CONTEXTS if backend == "cuda" else FEW_CONTEXTS:
        for batch in batches:
            if batch * context > 16 * 2048:
                continue
            own = case_of(context, batch, heads, width, bits)
            arguments = own.attention_arguments(ragged(own, context), prefix)
            with use_backend("torch"):
                exact = kv_attention(**(arguments | {"q": arguments["q"].float()} | floats(arguments)))
            with use_backend(backend):
                got = kv_attention(**arguments)
            name = f"context {context}, batch {batch}"
            if relative(got, exact) > TOLERANCE:
                failures.append(f"{relative(got, exact):.1e} {worst(name, got, exact)}")
            empty = arguments["lengths"] == 0
            if bool((got[empty] != 0).any()):
                failures.append(f"{name}: a row without slots is not zero")
    assert not failures, "\n".join(failures)


def floats(arguments: dict[str, Any]) -> dict[str, Any]:
    """Prefix (and float cache) in float32, as the float32 reference wants them."""
    names = [name for name in ("prefix_key", "prefix_value") if arguments.get(name) is not None]
    names += ["key_cache", "value_cache"] if arguments["bits"] == 16 else []
    return {name: arguments[name].float() for name in names}


@pytest.mark.parametrize(("backend", "bits"), [("cuda", 4), ("cuda", 8), ("triton", 4), ("triton", 16)])
@pytest.mark.parametrize(("heads", "dtype"), [((8, 2), torch.bfloat16), ((4, 4), torch.float16)], ids=str)
@pytest.mark.parametrize("prefix", [0, 3])
def test_attention_when_the_result_is_quantized_expect_the_reference_codes(
    backend: str, bits: int, heads: tuple[int, int], dtype: torch.dtype, prefix: int
) -> None:
    needs(backend)
    for context in (33, 1000):
        own = case_of(context, 3, heads, 128, bits, dtype=dtype)
        arguments = own.attention_arguments(ragged(own, context), prefix, out_bits=8)
        spread = kv_attention(**(arguments | {"out_bits": 0, "out_multiplier": None})).float().std()
        arguments["out_multiplier"] = arguments["out_multiplier"] / spread  # codes over the whole range
        with use_backend("torch"):
            want = kv_attention(**arguments)
        with use_backend(backend):
            got = kv_attention(**arguments)
        off = (got.int() - want.int()).abs()
        share = float((off > 0).float().mean())
        assert int(off.max()) <= 1, worst(f"context {context}", got, want)
        # Triton multiplies with p rounded to q's dtype: an error of 0.1 % of codes of spread 55.
        assert share < (0.03 if backend == "cuda" else 0.12), (
            f"context {context}: {share:.1%} of the codes are off by one"
        )
        assert want.unique().numel() > 150


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("heads", "prefix"), [((1, 1), 0), ((4, 1), 3), ((8, 1), 0)])
def test_attention_when_divided_in_every_way_expect_the_same_result(
    bits: int, heads: tuple[int, int], prefix: int
) -> None:
    needs("cuda")
    from mergequant.ops.cuda import kv

    own = case_of(1500, 3, heads, 128, bits)
    arguments = own.attention_arguments(own.lengths(1500, 77, 700), prefix)
    with use_backend("torch"):
        exact = kv_attention(**arguments)
    names = ("prefix_key", "prefix_value", "out_multiplier")
    given = {**dict.fromkeys(names), "out_bits": 0, "early": False} | arguments
    failures = []
    for division in kv.configurations(128, heads[0] // heads[1], bits, prefix > 0):
        for most in (1, 1500):
            out = torch.full_like(exact, math.nan)
            kv.attend(**(given | {"most": most}), out=out, division=division)
            if relative(out, exact) > TOLERANCE:
                failures.append(worst(f"{division}, most {most}", out, exact))
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(("backend", "bits"), [("cuda", 4), ("cuda", 8), ("triton", 16)])
def test_attention_when_one_token_takes_nearly_all_of_the_softmax_expect_the_others_kept(
    backend: str, bits: int
) -> None:
    needs(backend)
    own = case_of(2048, 1, (4, 4), 128, bits)
    arguments = own.attention_arguments(own.lengths(2048))
    # Slot 0 is a sink: its key is along q and its value is nothing, so that the rest makes the result.
    keys, values = own.random_cache()
    if bits < 16:
        k, v = kv_layout.unpack_keys(keys, 128, bits), kv_layout.unpack_values(values, 128, bits)
        k = (k.float() * 0.2).round().to(torch.int8)
        k[0, :, 0] = arguments["q"][0].sign().to(torch.int8) * kv_layout.code_limit(bits)
        v[0, :, 0] = 0
        arguments |= {"key_cache": kv_layout.pack_keys(k, bits), "value_cache": kv_layout.pack_values(v, bits)}
    else:
        keys[0, :, 0], values[0, :, 0] = arguments["q"][0].sign() * 2, 0
        arguments |= {"key_cache": keys, "value_cache": values}
    arguments["softmax_scale"] = 0.047  # nine tenths of the softmax go to the sink
    with use_backend("torch"):
        exact = kv_attention(**arguments)
    with use_backend(backend):
        got = kv_attention(**arguments)
    # Without a unit of p for every chunk all tokens of the sink's warp would be off, not those of its chunk alone.
    assert relative(got, exact) < 0.05, worst("sink", got, exact)
    assert float((got - exact).abs().max()) < 1e-4 * float(
        decoded(own, arguments["key_cache"], arguments["value_cache"])[1].abs().max()
    ), worst("sink", got, exact)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    ("backend", "heads"),
    [("cuda", (1, 1)), ("cuda", (8, 1)), ("cuda", (8, 4)), ("cuda", (4, 4)), ("triton", (8, 4))],
    ids=str,
)
def test_append_expect_the_reference_cache(
    backend: str, heads: tuple[int, int], width: int, bits: int, norms: bool
) -> None:
    needs(backend)
    failures = []
    for tokens, lengths in ((1, (0, 31, 100)), (2, (31, 62, 5)), (33, (0, 1, 31)), (200, (0, 56, 17))):
        own = case_of(256, 3, heads, width, bits)
        arguments = own.append_arguments(tokens, own.lengths(*lengths), norms)
        arguments["qkv"] = arguments["qkv"] * 2  # beyond the last code, too
        expected = arguments | {name: arguments[name].clone() for name in ("key_cache", "value_cache")}
        with use_backend("torch"):
            q, k = kv_append(**expected)
        with use_backend(backend):
            got_q, got_k = kv_append(**arguments)
        for name, got, want in (("q", got_q, q), ("k", got_k, k)):
            if float((got != want).float().mean()) > 1e-4 or relative(got, want) > 1e-4:
                failures.append(worst(f"{name}, {tokens} tokens at {lengths}", got, want))
        for name, take in (("key_cache", kv_layout.unpack_keys), ("value_cache", kv_layout.unpack_values)):
            got, want = arguments[name], expected[name]
            if bits < 16:
                got, want = take(got, width, bits).int(), take(want, width, bits).int()
                wrong = int((got - want).abs().max()) > 1
            else:
                wrong = relative(got, want) > 1e-4
            exact = name == "value_cache" or not norms  # only the norm's sum has an order of its own
            if wrong or float((got != want).float().mean()) > (0.0 if exact else 1e-4):
                failures.append(worst(f"{name}, {tokens} tokens at {lengths}", got, want))
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("backend", BACKENDS)
def test_append_when_tokens_exceed_the_capacity_expect_nan_and_an_intact_cache(backend: str) -> None:
    needs(backend)
    own = Case(2, 2, 1, 64, 4, 64, torch.bfloat16, "cuda")
    arguments = own.append_arguments(10, own.lengths(60, 54))
    inside = arguments | {name: arguments[name].clone() for name in ("key_cache", "value_cache")}
    with use_backend("torch"):
        for row, kept in ((0, 4), (1, 10)):
            views = {name: inside[name][row : row + 1] for name in ("key_cache", "value_cache", "lengths")}
            kv_append(**(inside | views | {"qkv": inside["qkv"][row : row + 1, :kept].contiguous()}))
    with use_backend(backend):
        q, k = kv_append(**arguments)
    assert bool(q[0, 4:].isnan().all())
    assert bool(k[0, 4:].isnan().all())
    assert not bool(q[0, :4].isnan().any())
    assert not bool(q[1].isnan().any())
    for name in ("key_cache", "value_cache"):
        assert torch.equal(arguments[name], inside[name]), worst(name, arguments[name], inside[name])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [64, 128])
def test_read_expect_the_reference(width: int, bits: int) -> None:
    own = case_of(300, 3, (4, 2), width, bits)
    keys, values = own.random_cache()
    for tokens in (1, 31, 300):
        arguments = (keys, values, own.key_scale, own.value_scale, tokens, bits, torch.bfloat16)
        with use_backend("torch"):
            want = kv_read(*arguments)
        with use_backend("triton"):
            got = kv_read(*arguments)
        assert torch.equal(got[0], want[0]), worst(f"keys, {tokens}", got[0], want[0])
        assert torch.equal(got[1], want[1]), worst(f"values, {tokens}", got[1], want[1])


@pytest.mark.parametrize(("bits", "heads"), [(4, (4, 4)), (4, (8, 2)), (8, (8, 1)), (16, (8, 2))])
def test_decode_steps_when_captured_with_overlap_expect_the_results_without(bits: int, heads: tuple[int, int]) -> None:
    """Twenty steps of append and attention in one graph, reading ahead, against the same steps one by one."""
    steps, start = 20, 50
    own = case_of(start + steps, 3, heads, 128, bits)
    first = own.append_arguments(1, own.lengths(start, 3, 29))
    inputs = [own.qkv(1) for _ in range(steps)]
    before = [first["lengths"] + step for step in range(steps)]
    after = [lengths + 1 for lengths in before]

    def run(cache: tuple[Tensor, Tensor], early: bool) -> list[Tensor]:
        results = []
        for qkv, lengths, visible in zip(inputs, before, after):
            own_cache = {"key_cache": cache[0], "value_cache": cache[1]}
            q, _ = kv_append(**(first | own_cache | {"qkv": qkv, "lengths": lengths}))
            scales = (own.key_scale, own.value_scale)
            out = kv_attention(q[:, 0], *cache, visible, *scales, 0.1, bits, start + steps, early=early)
            results.append(out)
        return results

    def copy() -> tuple[Tensor, Tensor]:
        return first["key_cache"].clone(), first["value_cache"].clone()

    plain_cache, warm, captured = copy(), copy(), copy()
    plain = run(plain_cache, early=False)
    with overlapping():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run(warm, early=True)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run(captured, early=True)
    for _ in range(5):
        for cache, original in zip(captured, (first["key_cache"], first["value_cache"])):
            cache.copy_(original)
        for result in results:
            result.fill_(math.nan)
        graph.replay()
        torch.cuda.synchronize()
        for step, (got, want) in enumerate(zip(results, plain)):
            assert torch.equal(got, want), worst(f"step {step}", got, want)
        for got, want in zip(captured, plain_cache):
            assert torch.equal(got, want), worst("cache", got, want)


def paged_case(own: Case, context: int, page: int, prefix: int) -> tuple[Paged, dict[str, Any], dict[str, Any]]:
    """A case in pages, and the arguments of attention over these and over contiguous rows of the same codes."""
    arguments = own.attention_arguments(ragged(own, context), prefix)
    paged = Paged(own, page)
    pages = paged.attention_arguments(arguments)
    paged.mark(tuple(range(own.batch)) if prefix else ())
    arguments |= {"key_cache": paged.rows(0).contiguous(), "value_cache": paged.rows(1).contiguous()}
    return paged, pages | {"out": torch.full_like(arguments["q"], math.nan)}, arguments


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("page", [64, 192])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (8, 1), (32, 8)], ids=str)
def test_page_attention_expect_the_bits_of_contiguous_attention(
    heads: tuple[int, int], width: int, bits: int, page: int, prefix: int
) -> None:
    needs("cuda")
    failures = []
    for context, batch in ((1, 1), (33, 3), (77, 16), (1000, 3), (2048, 1), (700, 40)):
        capacity = -(-context // 192) * 192
        own = Case(batch, *heads, width, bits, capacity, torch.bfloat16, "cuda", context)
        _, pages, arguments = paged_case(own, context, page, prefix)
        wide = torch.cat((pages["q"], pages["q"]), 1)  # rows with something between them
        kv_page_attention(**(pages | {"q": wide[:, : heads[0]]}))
        want = kv_attention(**arguments)
        got = pages["out"].flatten(1)
        apart = (got.float() - want.float()).abs() > 2**-7 * want.float().abs()  # a unit in the last place of bfloat16
        others = (
            (got != want).float().mean()
        )  # the stored token's part is compiled otherwise: some sums round otherwise
        if bool(apart.any()) or float(others) > (1e-4 if prefix else 0):
            failures.append(worst(f"context {context}, batch {batch}", got, want))
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [4, 8])
def test_page_attention_when_some_rows_begin_with_the_stored_token_expect_the_reference(
    backend: str, bits: int
) -> None:
    needs(backend)
    own = Case(6, 8, 2, 128, bits, 512, torch.bfloat16, "cuda")
    paged, pages, _ = paged_case(own, 500, 64, 1)
    paged.mark((0, 3, 4))
    want = torch.empty_like(pages["out"], dtype=torch.float32)
    with use_backend("torch"):
        kv_page_attention(**(pages | {"q": pages["q"].float(), "out": want} | floats(pages)))
    with use_backend(backend):
        kv_page_attention(**pages)
    assert relative(pages["out"], want) < TOLERANCE, worst("rows", pages["out"], want)
    assert not bool((pages["out"][5] != 0).any())  # a row without tokens


def store_case(own: Case, paged: Paged, slots: Tensor, stored: bool) -> dict[str, Any]:
    """Arguments of `kv_store` as an engine has them: query, key and value of a token side by side."""
    wide = own.normal(slots.shape[0], 4 * own.key_heads, own.width) * 2
    given: dict[str, Any] = {"key": wide[:, : own.key_heads], "value": wide[:, -own.key_heads :], "slots": slots}
    given |= {"pages": paged.pages, "key_scale": own.key_scale, "value_scale": own.value_scale, "bits": own.bits}
    if stored:
        given |= {f"prefix_{name}": own.normal(own.key_heads, 1, own.width) for name in ("key", "value")}
        first = slots % paged.page == 0
        given["key"][first] = given["prefix_key"][:, 0]
        given["key"][1::3, 0] += 1  # some of them are not the stored token, in one head
    return given


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("key_heads", [1, 8])
def test_store_expect_the_reference_pages(key_heads: int, width: int, bits: int, stored: bool) -> None:
    needs("cuda")
    own = Case(4, key_heads, key_heads, width, bits, 1024, torch.bfloat16, "cuda")
    paged = Paged(own, 64)
    total = paged.pages.shape[0] * 64
    scattered = [torch.randperm(total, generator=own.generator)[:count].cuda() for count in (1, 3, 64, 700)]
    scattered[3][::7] = -1
    runs = [torch.arange(a, b, device="cuda").repeat(4, 1) for a, b in ((0, 512), (5, 1000), (31, 47), (8, 290))]
    failures = []
    for slots in [*scattered, *(paged.slots(tokens).flatten() for tokens in runs)]:
        given = store_case(own, paged, slots, stored)
        wanted = given | {name: given[name].clone() for name in ("pages", "value")}
        with use_backend("torch"):
            kv_store(**wanted)
        kv_store(**given)
        for name in ("pages", "value"):
            if not torch.equal(given[name], wanted[name]):
                failures.append(worst(f"{name}, {slots.shape[0]} tokens", given[name], wanted[name]))
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("width", [64, 128])
def test_page_read_expect_the_reference(width: int, bits: int, prefix: bool) -> None:
    own = Case(3, 4, 2, width, bits, 512, torch.bfloat16, "cuda")
    paged = Paged(own, 64)
    paged.mark((0, 1))
    given = paged.read_arguments(past=(500, 64, 0), fresh=(3, 200, 5), prefix=prefix)
    wanted = given | {name: given[name].clone() for name in ("out_key", "out_value")}
    with use_backend("torch"):
        kv_page_read(**wanted)
    with use_backend("triton"):
        kv_page_read(**given)
    for name in ("out_key", "out_value"):
        assert torch.equal(given[name], wanted[name]), worst(name, given[name], wanted[name])


@pytest.mark.parametrize("bits", [4, 8])
def test_page_ops_when_captured_expect_what_they_give_one_by_one(bits: int) -> None:
    """One graph, replayed for other tables, lengths, slots and tokens, padded rows among them."""
    rows, most = 5, 1024
    own = Case(rows, 8, 2, 128, bits, most, torch.bfloat16, "cuda")
    paged, pages, _ = paged_case(own, 900, 64, 1)
    static = {name: pages[name] for name in ("q", "table", "lengths", "out")}
    store = store_case(own, paged, paged.slots(torch.zeros(rows, 1, dtype=torch.int64, device="cuda")).flatten(), True)
    pages |= {name: store[name] for name in ("prefix_key", "prefix_value")} | {"most": most}

    def run() -> None:
        kv_store(**store)
        kv_page_attention(**pages)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for length in (1, 64, 65, 700):
        lengths = torch.tensor([length, 1, 900, 333, 0], dtype=torch.int32, device="cuda")
        order = torch.randperm(paged.pages.shape[0], generator=own.generator)[: static["table"].numel()]
        static["table"].copy_(order.view_as(static["table"]))
        static["lengths"].copy_(lengths)
        paged.table = static["table"]
        slots = paged.slots((lengths.long() - 1).clamp(min=0)[:, None]).flatten()
        store["slots"].copy_(torch.where(lengths > 0, slots, -1))
        for name in ("key", "value"):
            store[name].copy_(own.normal(*store[name].shape))
        static["q"].copy_(own.normal(*static["q"].shape))
        before = paged.pages.clone()
        graph.replay()
        got, after = static["out"].clone(), paged.pages.clone()
        paged.pages.copy_(before)
        run()
        assert torch.equal(got, static["out"]), worst(f"length {length}", got, static["out"])
        assert torch.equal(after, paged.pages), worst(f"pages, length {length}", after, paged.pages)
