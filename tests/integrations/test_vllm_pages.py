"""This project's caches in an engine with pages: steps of several sequences give the logits of the fast loop."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

import mergequant
from families import COMMON
from mergequant.checkpoint import open_checkpoint
from mergequant.errors import UsageError
from mergequant.integrations.transformers.extract import extract
from mergequant.integrations.vllm.pages import CacheSteps, chosen_bits, plan_step, require_servable
from mergequant.integrations.vllm.report import cache_summary
from mergequant.integrations.vllm.shards import Share
from mergequant.nn import KVSpec
from vllm_stand_in import LONGEST, PAGE, StandIn, logits, stand_ins

SUMS = 1e-4  # of the logits' spread: float sums in another order, which turn no code over here
ROOM = 8192
Make = Callable[[], Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with heads that the kernels take, and a stored first token."""
    torch.manual_seed(0)
    config = LlamaConfig(**(COMMON | {"head_dim": 64, "max_position_embeddings": LONGEST}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    tokens = torch.randint(3, 97, (6, 24), generator=torch.Generator().manual_seed(7))
    tokens[:, 0] = 1
    out = tmp_path_factory.mktemp("pages") / "w4a8"
    mergequant.quantize(
        model, "mergequant-w4a8", out=out, data=tokens, samples=4, seqlen=24, settings={"tile": 8, "prefix": "bos"}
    )
    return out


class Engine:
    """Runs steps of rows (request, tokens, first position); requests own pages of a table."""

    def __init__(self, folder: Path, bits: int, size: int = 1) -> None:
        config = AutoConfig.from_pretrained(folder)
        self.group, self.models = stand_ins(open_checkpoint(folder), config, size, bits)
        self.table = torch.tensor([[5, 2, 9], [3, 8, 0], [7, 11, 1]], dtype=torch.int32)

    def step(self, *rows: tuple[int, Sequence[int], int]) -> list[Tensor]:
        """Logits of each row's tokens; rows with one token come first."""
        sizes = [len(tokens) for _, tokens, _ in rows]
        starts = torch.tensor([0, *sizes]).cumsum(0).int()
        places = [torch.arange(first, first + size) for (_, _, first), size in zip(rows, sizes)]
        table = self.table[[request for request, _, _ in rows]]
        slots = [own.long()[place // PAGE] * PAGE + place % PAGE for own, place in zip(table, places)]
        lengths = [first + size for (_, _, first), size in zip(rows, sizes)]
        step = plan_step(
            torch.cat(slots),
            table,
            torch.tensor(lengths, dtype=torch.int32),
            starts,
            starts.tolist(),
            lengths,
            sizes.count(1),
            max(lengths),
            ROOM,
            lambda numbers: torch.tensor(numbers, dtype=torch.int32),
        )
        for model in self.models:
            model.pages.step = step
        ids = torch.tensor([token for _, tokens, _ in rows for token in tokens])
        return list(logits(self.group, self.models, ids, torch.cat(places)).split(sizes))


def text(count: int, seed: int) -> list[int]:
    return [1, *torch.randint(3, 97, (count - 1,), generator=torch.Generator().manual_seed(seed)).tolist()]


def deviation(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.std())


class Loop:
    """The same sequence on the fast loop: logits behind the last token of each piece."""

    def __init__(self, folder: Path, bits: int) -> None:
        self.decoder = extract(mergequant.load(folder, dtype=torch.float32, serve=False), bits)
        self.cache, self.past = self.decoder.new_cache(1, 192), 0

    def prefill(self, tokens: Sequence[int]) -> Tensor:
        given = torch.tensor([tokens if self.past else tokens[1:]])  # the prefix stands for BOS
        found = self.decoder.prefill(given, self.cache, None, self.past or None)[0]
        self.past += len(tokens)
        return found

    def step(self, token: int) -> Tensor:
        return self.decoder.step(torch.tensor([token]), self.cache)[0]


@pytest.mark.parametrize(("bits", "size"), [(8, 1), (4, 1), (8, 2), (4, 4)])
def test_steps_of_several_sequences_expect_the_logits_of_the_fast_loop(checkpoint: Path, bits: int, size: int) -> None:
    engine = Engine(checkpoint, bits, size)
    first, second, loops = text(80, 1), text(140, 2), [Loop(checkpoint, bits) for _ in range(2)]
    (got,) = engine.step((0, first[:63], 0))
    assert deviation(got[-1], loops[0].prefill(first[:63])) < SUMS
    # the other's prompt comes in pieces, beside a sequence that decodes across the end of a page
    for token, (begin, end) in zip(range(63, 66), ((0, 40), (40, 41), (41, 137))):
        rows = [(0, first[token : token + 1], token), (1, second[begin:end], begin)]
        decoded, piece = engine.step(*rows)
        assert deviation(decoded[0], loops[0].step(first[token])) < SUMS
        if end == begin + 1:
            loops[1].step(second[begin])
            loops[1].past += 1
        else:
            assert deviation(piece[-1], loops[1].prefill(second[begin:end])) < SUMS
    for token in range(66, 69):
        rows = [(0, first[token : token + 1], token), (1, second[token + 71 : token + 72], token + 71)]
        for got, loop, (_, tokens, _) in zip(engine.step(*rows), loops, rows):
            assert deviation(got[0], loop.step(tokens[0])) < SUMS


@pytest.mark.parametrize("bits", [8, 4])
def test_a_shared_first_page_expect_what_an_own_one_gives(checkpoint: Path, bits: int) -> None:
    engine, tokens = Engine(checkpoint, bits), text(90, 3)
    engine.step((0, tokens[:64], 0))

    def rest(request: int) -> list[Tensor]:
        return [engine.step((request, tokens[a:b], a))[0] for a, b in ((64, 80), (80, 81), (81, 82))]

    wanted = rest(0)
    engine.table[1, 0] = engine.table[0, 0]  # the other begins with the first one's page, which is marked
    for got, want in zip(rest(1), wanted):
        assert torch.equal(got, want)


@pytest.mark.parametrize("prompt", [text(70, 4), text(70, 4)[1:], [1]])
def test_a_fresh_prompt_expect_the_logits_of_attention_without_a_cache(checkpoint: Path, prompt: list[int]) -> None:
    """With the stored first token, without it, and it alone."""
    config, ids = AutoConfig.from_pretrained(checkpoint), torch.tensor(prompt)
    plain = logits(*stand_ins(open_checkpoint(checkpoint), config, 1), ids)
    (got,) = Engine(checkpoint, 8).step((0, prompt, 0))
    assert deviation(got, plain) < SUMS


def plan(queries: list[int], lengths: list[int], decodes: int, room: int = 100) -> list[Any]:
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    empty = torch.empty(0)
    step = plan_step(empty, empty, empty, starts, starts.tolist(), lengths, decodes, 9, room, torch.tensor)
    return [
        (
            p.rows.start,
            p.rows.stop,
            p.queries.tolist(),
            p.longest,
            None if p.starts is None else p.starts.tolist(),
            p.most,
        )
        for p in step.prompts
    ]


def test_plan_step_expect_prompts_without_history_at_once_and_others_as_room_allows() -> None:
    assert plan([1, 1], [5, 9], 2) == []
    assert plan([1, 7, 3], [50, 7, 3], 1) == [(1, 3, [1, 8, 11], 7, None, 7)]
    assert plan([1, 7, 3], [50, 7, 13], 1) == [(1, 3, [1, 8, 11], 7, [0, 7, 20], 13)]
    assert plan([5, 7, 3, 4], [60, 41, 59, 99], 0) == [
        (0, 1, [0, 5], 5, [0, 60], 60),
        (1, 3, [5, 12, 15], 7, [0, 41, 100], 59),
        (3, 4, [15, 19], 4, [0, 99], 99),
    ]


def test_chosen_bits_expect_vllms_own_cache_unless_asked() -> None:
    assert chosen_bits({}, "fp8") == 16
    assert chosen_bits(object(), "auto") == 16
    assert chosen_bits({"kv_bits": 4}, "auto") == 4
    with pytest.raises(UsageError, match=r"kv_bits is 6"):
        chosen_bits({"kv_bits": 6}, "auto")
    with pytest.raises(UsageError, match=r"ask for two caches"):
        chosen_bits({"kv_bits": 8}, "fp8")


@pytest.mark.parametrize(
    ("spec", "heads", "width", "message"),
    [
        (None, 4, 64, "stores no steps"),
        (KVSpec(2, 2, 64, 64, "paley_64"), 4, 64, "rotate_keys"),
        (KVSpec(2, 2, 64, 32), 4, 64, "64 wide"),
        (KVSpec(2, 2, 96, 96), 4, 96, "no kernel"),
        (KVSpec(2, 2, 64, 64), 32, 64, "no kernel"),
    ],
)
def test_a_cache_that_no_kernel_serves_expect_an_error_with_the_way_out(
    spec: KVSpec | None, heads: int, width: int, message: str
) -> None:
    with pytest.raises(UsageError, match=f"{message}.*leave out kv_bits"):
        require_servable(spec, heads, 2, width)


def test_pages_of_two_gpus_expect_half_the_bytes_and_own_steps(checkpoint: Path) -> None:
    whole = StandIn.get_submodule(Engine(checkpoint, 4).models[0], "model.mergequant_kv")
    parts = [model.get_submodule("model.mergequant_kv") for model in Engine(checkpoint, 4, 2).models]
    assert isinstance(whole, CacheSteps)
    assert whole.token_bytes == 2 * 2 * 64 // 2
    for name in ("key_scale", "value_scale"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], 1), getattr(whole, name))
    steps = CacheSteps("x", KVSpec(2, 2, 64, 64), 8, 1, Share(1, 2), torch.float32, 100)
    assert (steps.token_bytes, steps.start) == (2 * 64, 1)


def test_kernels_are_tried_before_the_first_request(checkpoint: Path) -> None:
    model = Engine(checkpoint, 8).models[0]
    model.model.layers[0].self_attn.attn.pages.warm(4, torch.float32)


def test_the_log_says_which_cache_is_used() -> None:
    told = cache_summary(32, 8, 64, 524288, torch.device("cpu"))
    assert told.startswith(
        "keys and values of 32 layers in 8 bits, 524288 bytes for 64 tokens of one: kv_store (torch)"
    )
