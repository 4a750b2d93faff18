"""Score a model on token windows: negative log-likelihood, and distance to a float model token by token.

Every figure is over predicted tokens: the label of a position is the next token of the same window, nothing is
predicted across windows. Logarithms are taken in float32, sums in float64: figures do not depend on the batch size.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedModel

from mergequant.data.windows import Windows
from mergequant.errors import NumericsError, UsageError

__all__ = ["Divergence", "Likelihood", "Scores", "score"]


CacheMaker = Callable[[PreTrainedModel], Cache]


@dataclass(frozen=True, eq=False)
class Likelihood:
    """How well one model predicts.

    nll: mean negative log-likelihood in nats per token. window_nll: (N,) float64, the same per window.
    tokens: number of predicted tokens. tokens_per_second: input tokens per second of forward passes, prefill only.
    """

    nll: float
    window_nll: torch.Tensor
    tokens: int
    tokens_per_second: float

    @property
    def perplexity(self) -> float:
        """exp(nll); infinite where that overflows."""
        return math.exp(self.nll) if self.nll < 709 else math.inf

    @property
    def nll_standard_error(self) -> float | None:
        """Standard error of `nll` from the spread between windows; None for a single window."""
        return standard_error(self.window_nll)


@dataclass(frozen=True)
class Divergence:
    """Distance of a model from the float model, over predicted tokens.

    kl_mean, kl_p99: KL(float || model) in nats, mean and 99th percentile. top1_agreement: share of tokens with equal
    most likely token. nll_increase_standard_error: of the *paired* difference of the windows' likelihoods.
    """

    kl_mean: float
    kl_p99: float
    top1_agreement: float
    nll_increase: float
    nll_increase_standard_error: float | None


@dataclass(frozen=True)
class Scores:
    """Result of `score`: the model, and, if asked for, the float model and the distance between them."""

    model: Likelihood
    against: Likelihood | None = None
    divergence: Divergence | None = None


class _Runner:
    """One model being scored: runs batches, keeps sums and time."""

    def __init__(self, model: PreTrainedModel, name: str, new_cache: CacheMaker | None = None) -> None:
        self.model, self.name, self.new_cache = model.eval(), name, new_cache
        self.seconds = 0.0
        self.fed = 0
        self.window_sums: list[float] = []

    def logits(self, tokens: torch.Tensor, first_window: int) -> torch.Tensor:
        """(B, T) int64 -> (B, T - 1, V) logits that predict tokens 1..T-1."""
        inputs = tokens.to(self.model.device)
        begin = time.perf_counter()
        cache = None if self.new_cache is None else self.new_cache(self.model)
        logits = self.model(input_ids=inputs, past_key_values=cache, use_cache=cache is not None).logits[:, :-1]
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        self.seconds += time.perf_counter() - begin
        self.fed += tokens.numel()
        finite = torch.isfinite(logits).all(-1)
        if not bool(finite.all()):
            row, position = (~finite).nonzero()[0].tolist()
            raise NumericsError(
                f"{self.name} model gave a non-finite logit in window {first_window + row} at position {position}; "
                "evaluate in float32 or bfloat16; a quantized model that does so in float32 should be made anew."
            )
        return logits

    def likelihood(self, counts: list[int]) -> Likelihood:
        sums = torch.tensor(self.window_sums, dtype=torch.float64)
        rate = self.fed / self.seconds if self.seconds > 0 else math.inf
        return Likelihood(float(sums.sum() / sum(counts)), sums / torch.tensor(counts), sum(counts), rate)


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    windows: Windows,
    *,
    batch_size: int = 8,
    against: PreTrainedModel | None = None,
    device: torch.device | str | None = None,
    new_cache: CacheMaker | None = None,
) -> Scores:
    """Run `model`, and `against` (the float model) beside it, over `windows`.

    Models are moved to `device` if it is given and run where they are otherwise. Windows with a stride contribute their
    last `stride` tokens only, except the first. `new_cache` makes the cache through which `model` attends in each pass
    (None: without one); with a quantized one, every token sees the tokens before it, and itself, as they come out of
    that cache, which is what it sees when text is generated one token at a time. Raises `NumericsError` naming window
    and position at the first logit that is not finite, `UsageError` for a bad batch size or models of different
    vocabularies.
    """
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: must be at least 1.")
    runners = [_Runner(_placed(model, device), "Quantized" if against is not None else "The", new_cache)]
    if against is not None:
        runners.append(_Runner(_placed(against, device), "Float"))
    counts: list[int] = []
    divergences: list[torch.Tensor] = []
    agreements = 0
    for begin in range(0, len(windows), batch_size):
        tokens = windows.tokens[begin : begin + batch_size]
        batch = [runner.logits(tokens, begin) for runner in runners]
        for row in range(len(tokens)):  # by window: a whole batch in float32 would double the peak memory
            skip = 0 if windows.stride is None or begin + row == 0 else max(tokens.shape[1] - 1 - windows.stride, 0)
            labels = tokens[row, 1 + skip :]
            counts.append(len(labels))
            logs = [logits[row, skip:].float().log_softmax(-1) for logits in batch]
            for runner, log in zip(runners, logs, strict=True):
                picked = log.gather(-1, labels.to(log.device)[:, None])
                runner.window_sums.append(-float(picked.sum(dtype=torch.float64)))
            if len(logs) == 2:
                quantized, exact = _same_vocabulary(logs[0], logs[1])
                divergences.append((exact.exp() * (exact - quantized)).sum(-1, dtype=torch.float64).cpu())
                agreements += int((exact.argmax(-1) == quantized.argmax(-1)).sum())
    first = runners[0].likelihood(counts)
    if len(runners) == 1:
        return Scores(first)
    exact_scores = runners[1].likelihood(counts)
    kl = torch.cat(divergences)
    return Scores(
        first,
        exact_scores,
        Divergence(
            kl_mean=float(kl.mean()),
            kl_p99=float(kl.sort().values[math.ceil(0.99 * len(kl)) - 1]),
            top1_agreement=agreements / len(kl),
            nll_increase=first.nll - exact_scores.nll,
            nll_increase_standard_error=standard_error(first.window_nll - exact_scores.window_nll),
        ),
    )


def standard_error(values: torch.Tensor) -> float | None:
    """Standard error of the mean of independent values (N,); None for fewer than two."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else None


def _placed(model: PreTrainedModel, device: torch.device | str | None) -> PreTrainedModel:
    if device is not None:
        torch.nn.Module.to(model, device)
    return model


def _same_vocabulary(quantized: torch.Tensor, exact: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if quantized.shape[-1] != exact.shape[-1]:
        raise UsageError(
            f"Cannot compare a model of {quantized.shape[-1]} output tokens with one of {exact.shape[-1]}; "
            "--against must be the model that was quantized."
        )
    return quantized, exact.to(quantized.device)
