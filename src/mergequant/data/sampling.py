"""Text-free data: sequences that the float model writes itself.

Sampling at temperature 1 without truncation draws from the very distribution that the quantized model has to reproduce,
which is why it serves for calibration, and why the bundled demo needs no text written by others.
"""

import hashlib

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from mergequant.errors import DataError, NumericsError

__all__ = ["sample_windows", "stream_seed"]


def stream_seed(seed: int, purpose: str) -> int:
    """A seed for one purpose: calibration and evaluation never share random numbers, whatever seeds users pass."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{seed}".encode()).digest()[:7], "little")


@torch.inference_mode()
def sample_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    seqlen: int,
    seed: int,
    *,
    bos: bool = True,
    batch_size: int = 32,
) -> torch.Tensor:
    """Sample (samples, seqlen) int64 token windows from the model itself.

    A window begins with BOS, which is kept when `bos` is true; without a BOS token the first one is uniformly random.
    An end-of-sequence token does not end a window: windows must be full, and what follows is drawn from the model's
    own continuation, just as joined documents follow each other in text data, with no second BOS.
    Each token is the inverse CDF at a uniform number that depends on seed, row and position only, so that results do
    not depend on `batch_size` (up to rounding of the logits). Raises `NumericsError` at the first non-finite logit.
    """
    start: int | None = getattr(tokenizer, "bos_token_id", None)
    vocabulary = len(tokenizer)
    if vocabulary < 1:
        raise DataError("data self: the tokenizer has no vocabulary to sample from.")
    drop_first = start is not None and not bos
    length = seqlen + int(drop_first)
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand((samples, length), generator=generator, dtype=torch.float64)
    first = (uniform[:, 0] * vocabulary).long() if start is None else torch.full((samples,), start)
    tokens = torch.empty((samples, length), dtype=torch.int64)
    tokens[:, 0] = first
    training = model.training
    model.eval()
    try:
        for begin in range(0, samples, batch_size):
            rows = slice(begin, min(begin + batch_size, samples))
            cache = DynamicCache(config=model.config)
            for position in range(1, length):
                logits = model(
                    input_ids=tokens[rows, position - 1 : position].to(model.device),
                    past_key_values=cache,
                    use_cache=True,
                ).logits[:, -1, :vocabulary]  # padded rows of the embedding are no tokens
                if not bool(torch.isfinite(logits).all()):
                    raise NumericsError(
                        f"Float model gave a non-finite logit while sampling window {begin} at position {position}; "
                        "check its weights, or load it in float32."
                    )
                tokens[rows, position] = _inverse_cdf(logits, uniform[rows, position]).cpu()
    finally:
        model.train(training)
    return tokens[:, int(drop_first) :].contiguous()


def _inverse_cdf(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token at which the cumulated probability passes `uniform`: (B, V), (B,) -> (B,) int64."""
    cdf = logits.double().softmax(-1).cumsum(-1)
    target = uniform.to(cdf.device)[:, None] * cdf[:, -1:]  # the last entry is 1 up to rounding
    return torch.searchsorted(cdf, target, right=True)[:, 0].clamp_max(cdf.shape[-1] - 1)
