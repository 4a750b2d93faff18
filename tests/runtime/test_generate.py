"""The loop: rows of different lengths, ends, streams, random numbers, limits."""

from collections.abc import Callable

import pytest
import torch

from mergequant.errors import InputError
from mergequant.runtime import Decoder, Sampling, Steppers, generate, prefill
from mergequant.runtime import generate as module
from mergequant.runtime.graphs import capacity_for

PROMPTS = [[1, 9, 8, 7, 6, 5, 4, 3], [1, 30, 31], [1]]


def one_by_one(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens by running the whole text again for each."""
    text = list(prompt)
    for _ in range(count):
        own = text[1:] if decoder.prefix is not None and decoder.prefix.spec.replaces_bos else text
        cache = decoder.new_cache(1, decoder.prefix_tokens + len(own) + 1)
        text.append(int(prefill(decoder, [own], cache)[0].argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize(("prefix", "replaces_bos"), [(0, True), (1, True), (3, True), (2, False)])
def test_generate_when_rows_differ_in_length_equals_rows_alone(
    decoder: Callable[..., Decoder], prefix: int, replaces_bos: bool
) -> None:
    made = decoder(prefix=prefix, replaces_bos=replaces_bos)
    together = generate(made, PROMPTS, 12)
    assert together == [generate(made, [prompt], 12)[0] for prompt in PROMPTS]
    assert together == [one_by_one(made, prompt, 12) for prompt in PROMPTS]


def test_generate_when_row_ends_keeps_its_end_and_drops_the_rest(decoder: Callable[..., Decoder]) -> None:
    made = decoder()
    free = generate(made, PROMPTS, 40)
    end = free[0][3]
    ended = generate(made, PROMPTS, 40, eos=[end])
    for row, whole in zip(ended, free):
        stop = whole.index(end) + 1 if end in whole else 40
        assert row == whole[:stop]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, seed=4), Sampling(0.7, 20, 0.9, seed=4)])
def test_generate_when_streamed_tells_every_token_once(decoder: Callable[..., Decoder], sampling: Sampling) -> None:
    made = decoder()
    end = generate(made, PROMPTS, 21, sampling=sampling)[1][5]
    seen: list[list[int | None]] = []
    rows = generate(made, PROMPTS, 21, sampling=sampling, eos=[end], on_tokens=seen.append)
    for number, row in enumerate(rows):
        told = [step[number] for step in seen]
        assert told[: len(row)] == row
        assert set(told[len(row) :]) <= {None}
    assert len(seen) == max(len(row) for row in rows)


def test_generate_when_first_call_was_in_inference_mode_goes_on_outside(decoder: Callable[..., Decoder]) -> None:
    made = decoder()
    steppers = Steppers(made)
    with torch.inference_mode():
        first = generate(made, PROMPTS, 5, steppers=steppers)
    assert generate(made, PROMPTS, 5, steppers=steppers) == first


def test_generate_when_sampling_follows_the_seed_only(decoder: Callable[..., Decoder]) -> None:
    made = decoder()
    texts = [generate(made, PROMPTS, 10, sampling=Sampling(1.5, seed=seed)) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_steppers_when_request_is_of_the_same_kind_are_used_again(decoder: Callable[..., Decoder]) -> None:
    made = decoder()
    steppers = Steppers(made)
    first = generate(made, PROMPTS, 30, steppers=steppers)
    stepper = steppers.get(3, 8, Sampling().kind, False)
    assert generate(made, PROMPTS[::-1], 30, steppers=steppers) == first[::-1]
    assert steppers.get(3, 8, Sampling().kind, False) is stepper
    assert steppers.get(2, 8, Sampling().kind, False) is not stepper


def test_generate_when_prompts_are_run_in_pieces_gives_the_same(
    decoder: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = decoder(prefix=1)
    prompts = [[1, *range(3, 40)], [1, *range(20, 25)], [1], [1, 5]]
    whole = generate(made, prompts, 6)
    import sys

    for most in (8, 100):
        monkeypatch.setattr(sys.modules["mergequant.runtime.generate"], "PREFILL_TOKENS", most)
        assert generate(made, prompts, 6) == whole


@pytest.mark.parametrize("sizes", [(1, 256), (256, 256), (257, 512), (4097, 5120), (8000, 8000)])
def test_capacity_grows_in_few_steps(sizes: tuple[int, int]) -> None:
    assert capacity_for(sizes[0], 8000) == sizes[1]


@pytest.mark.parametrize(
    ("prompts", "count", "words"),
    [
        ([], 4, "nothing to generate"),
        ([[1]], 0, "nothing to generate"),
        ([[1], []], 4, "prompt 1 is empty"),
        ([[1, 4], [5, 1]], 4, "prompt 1 begins with token 5 instead of BOS"),
        ([[1, 2, 3]], 191, "need 193 positions, the model has 192"),
    ],
)
def test_generate_when_request_cannot_be_served_says_why(
    decoder: Callable[..., Decoder], prompts: list[list[int]], count: int, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        generate(decoder(prefix=1), prompts, count)


def test_generate_when_text_fills_all_positions_works(decoder: Callable[..., Decoder]) -> None:
    made = decoder(positions=64)
    assert len(generate(made, [[1, 2, 3]], 62)[0]) == 62
    with pytest.raises(InputError, match="65 positions"):
        generate(made, [[1, 2, 3]], 63)
    assert module is generate
