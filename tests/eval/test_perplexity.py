import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import DynamicCache

from mergequant.data import Windows, head_windows
from mergequant.errors import NumericsError, UsageError
from mergequant.eval import score


@pytest.fixture
def windows(text_file: Path, tokenizer: Any) -> Windows:
    return head_windows(str(text_file), tokenizer, samples=5, seqlen=24)


def test_score_when_compared_with_cross_entropy_is_equal(model: Any, windows: Windows) -> None:
    with torch.inference_mode():
        logits = model(windows.tokens).logits[:, :-1].flatten(0, 1)
    expected = cross_entropy(logits, windows.tokens[:, 1:].flatten())
    result = score(model, windows, batch_size=2).model
    assert result.nll == pytest.approx(float(expected), rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.tokens == 5 * 23
    assert result.nll_standard_error == pytest.approx(float(result.window_nll.std()) / math.sqrt(5))
    assert score(model, windows).against is None


def test_score_when_against_itself_has_no_distance(model: Any, windows: Windows) -> None:
    result = score(model, windows, against=model)
    assert result.divergence is not None
    assert (result.divergence.kl_mean, result.divergence.top1_agreement, result.divergence.nll_increase) == (0, 1, 0)


def test_score_when_against_another_gives_kl_from_float_to_quantized(
    model: Any, other_model: Any, windows: Windows
) -> None:
    result = score(other_model, windows, against=model, batch_size=3).divergence
    with torch.inference_mode():
        quantized, exact = (m(windows.tokens).logits[:, :-1].flatten(0, 1).double() for m in (other_model, model))
    kl = kl_div(quantized.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert result is not None
    assert result.kl_mean == pytest.approx(float(kl.mean()), rel=1e-5)
    assert result.kl_p99 == pytest.approx(float(kl.quantile(0.99, interpolation="higher")), rel=1e-5)
    assert result.top1_agreement == pytest.approx(float((quantized.argmax(-1) == exact.argmax(-1)).double().mean()))


def test_score_when_a_cache_is_given_runs_the_model_through_a_fresh_one_each_pass(
    model: Any, other_model: Any, windows: Windows
) -> None:
    made = []

    def new_cache(of: Any) -> DynamicCache:
        assert of is other_model
        made.append(DynamicCache(config=of.config))
        return made[-1]

    result = score(other_model, windows, batch_size=2, against=model, new_cache=new_cache)
    assert [cache.get_seq_length() for cache in made] == [24] * 3
    assert result.model.nll == pytest.approx(score(other_model, windows).model.nll, rel=1e-6)


def test_score_when_batched_differently_gives_the_same_figures(model: Any, windows: Windows) -> None:
    nlls = [score(model, windows, batch_size=size).model.nll for size in (1, 2, 8)]
    assert nlls == pytest.approx([nlls[0]] * 3, rel=1e-6)


def test_score_when_strided_predicts_every_text_token_once(model: Any, text_file: Path, tokenizer: Any) -> None:
    windows = head_windows(str(text_file), tokenizer, samples=4, seqlen=24, stride=7)
    result = score(model, windows).model
    assert result.tokens == 23 + 3 * 7
    with torch.inference_mode():
        logs = model(windows.tokens).logits.log_softmax(-1)
    picked = logs[:, :-1].gather(-1, windows.tokens[:, 1:, None])[..., 0]
    expected = -(picked[0].sum() + picked[1:, -7:].sum()) / result.tokens
    assert result.nll == pytest.approx(float(expected), rel=1e-5)


def test_score_when_a_logit_is_not_finite_names_window_and_position(
    model: Any, windows: Windows, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, seen = model.forward, []

    def broken(input_ids: torch.Tensor, **options: Any) -> Any:
        out = forward(input_ids, **options)
        seen.append(len(input_ids))
        if sum(seen) > 2:
            out.logits[1, 6, 5] = torch.inf
        return out

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(NumericsError, match="window 3 at position 6"):
        score(model, windows, batch_size=2)


def test_score_when_vocabularies_or_batch_size_are_wrong_raises(model: Any, windows: Windows) -> None:
    other = model.__class__(model.config.__class__(**{**model.config.to_dict(), "vocab_size": 8200}))
    with pytest.raises(UsageError, match="8192 output tokens with one of 8200"):
        score(model, windows, against=other)
    with pytest.raises(UsageError, match="--batch-size"):
        score(model, windows, batch_size=0)
