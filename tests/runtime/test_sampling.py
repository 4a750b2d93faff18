"""Drawing tokens: frequencies, borders, and what top-k and top-p leave out."""

import pytest
import torch

from mergequant.errors import UsageError
from mergequant.runtime import Sampling
from mergequant.runtime.sampling import choose, uniform_numbers

DRAWS = 20000


def frequencies(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Share of each token among many draws from one row of logits (vocabulary,)."""
    uniform = uniform_numbers(sampling.seed, 1, DRAWS)[0]
    chosen = choose(
        logits.expand(DRAWS, -1), sampling.kind, uniform, torch.tensor([sampling.temperature]),
        torch.tensor([sampling.top_p]),
    )  # fmt: skip
    return torch.bincount(chosen, minlength=logits.shape[0]) / DRAWS


def test_choose_when_greedy_takes_the_likeliest() -> None:
    logits = torch.randn(5, 33, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(5)
    got = choose(logits, Sampling().kind, nothing, nothing, nothing)
    assert torch.equal(got, logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_choose_when_sampling_follows_the_softmax(temperature: float) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 2
    want = (logits / temperature).softmax(-1)
    torch.testing.assert_close(frequencies(logits, Sampling(temperature)), want, rtol=0, atol=0.015)


def test_choose_when_top_k_draws_among_k_only() -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(2))
    best = logits.topk(3).indices
    want = torch.zeros(12).index_copy_(0, best, logits[best].softmax(-1))
    torch.testing.assert_close(frequencies(logits, Sampling(1.0, top_k=3)), want, rtol=0, atol=0.015)


def test_choose_when_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = torch.tensor([0.5, 0.1, 0.25, 0.15]).log()
    got = frequencies(logits, Sampling(1.0, top_p=0.6))
    torch.testing.assert_close(got, torch.tensor([2 / 3, 0.0, 1 / 3, 0.0]), rtol=0, atol=0.015)
    assert torch.equal(frequencies(logits, Sampling(1.0, top_p=0.4)), torch.tensor([1.0, 0.0, 0.0, 0.0]))


def test_choose_when_top_k_and_top_p_are_given_applies_k_first() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    got = frequencies(logits, Sampling(1.0, top_k=2, top_p=0.7))  # of 4/7 and 3/7, both are needed for 0.7
    torch.testing.assert_close(got, torch.tensor([4 / 7, 3 / 7, 0.0, 0.0]), rtol=0, atol=0.015)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_choose_when_number_is_at_the_border_never_draws_an_excluded_token(uniform: float) -> None:
    logits = torch.full((1, 50000), -torch.inf)
    logits[0, [7, 49000]] = torch.tensor([0.3, 0.1])
    number = uniform_numbers(0, 1, 1)[0] * 0 + uniform * (1 - 1e-6)
    for sampling in (Sampling(1.0), Sampling(1.0, top_k=40), Sampling(1.0, top_p=0.99)):
        token = choose(logits, sampling.kind, number, torch.ones(1), torch.tensor([sampling.top_p]))
        assert int(token) in (7, 49000)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_when_out_of_range_refuses(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Sampling(**wrong)  # type: ignore[arg-type]
