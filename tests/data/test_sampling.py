from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mergequant.data import draw_splits, draw_windows, head_windows, overlap, sketch
from mergequant.data.sampling import _inverse_cdf, sample_windows
from mergequant.errors import NumericsError


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=80,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def test_sample_when_seed_is_equal_repeats_whatever_the_batch_size(model: Any, tokenizer: Any) -> None:
    one = sample_windows(model, tokenizer, 5, 24, seed=1)
    assert one.shape == (5, 24)
    assert (one[:, 0] == 0).all()
    assert torch.equal(one, sample_windows(model, tokenizer, 5, 24, seed=1, batch_size=2))
    assert not torch.equal(one, sample_windows(model, tokenizer, 5, 24, seed=2))


def test_sample_when_embedding_is_padded_gives_tokens_of_the_vocabulary_only(model: Any, tokenizer: Any) -> None:
    assert int(sample_windows(model, tokenizer, 8, 32, seed=0).max()) < len(tokenizer)


def test_sample_when_bos_is_not_kept_or_absent_starts_with_text(
    model: Any, tokenizer: Any, tokenizer_without_bos: Any
) -> None:
    kept = sample_windows(model, tokenizer, 4, 12, seed=3)
    dropped = sample_windows(model, tokenizer, 4, 12, seed=3, bos=False)
    assert dropped.shape == kept.shape
    assert dropped[:, 0].any()
    first = sample_windows(model, tokenizer_without_bos, 64, 2, seed=3)[:, 0]
    assert first.unique().numel() > 20


def test_sample_when_model_gives_nan_names_the_position(model: Any, tokenizer: Any) -> None:
    class Broken(torch.nn.Module):
        config, device, training = model.config, torch.device("cpu"), False

        def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.full((*input_ids.shape, 80), torch.nan))

    with pytest.raises(NumericsError, match="position 1"):
        sample_windows(Broken(), tokenizer, 2, 8, seed=0)  # type: ignore[arg-type]


def test_inverse_cdf_when_uniform_is_dense_reproduces_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.125, 0.375])
    uniform = (torch.arange(800, dtype=torch.float64) + 0.5) / 800
    tokens = _inverse_cdf(probabilities.log().expand(800, 4), uniform)
    assert torch.equal(tokens.bincount(minlength=4) / 800, probabilities)


def test_self_data_when_split_or_evaluated_never_shares_sequences(model: Any, tokenizer: Any) -> None:
    first, second = draw_splits("self", tokenizer, samples=6, held_out=6, seqlen=48, seed=7, model=model)
    assert first.fingerprint == draw_windows("self", tokenizer, samples=6, seqlen=48, seed=7, model=model).fingerprint
    third = head_windows("self", tokenizer, samples=6, seqlen=48, seed=7, model=model)
    sketches = [sketch(w.tokens) for w in (first, second, third)]
    assert [overlap(a, b) for a in sketches for b in sketches if a is not b] == [0.0] * 6
