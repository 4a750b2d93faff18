"""generate: prompts in, tokens out; the host runs ahead of the device and looks at tokens in bursts.

On a GPU, decode steps are started one after another without waiting. After every burst its tokens are copied to the
host beside the next burst, so that the end of a sequence is noticed up to two bursts late; what was written after it
is dropped.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mergequant.errors import InputError
from mergequant.runtime.cache import KVCache
from mergequant.runtime.decoder import Decoder
from mergequant.runtime.graphs import Stepper, Steppers
from mergequant.runtime.sampling import Sampling

__all__ = ["OnTokens", "generate", "prefill"]

BURST = 16  # steps between looks at the tokens of a GPU
PREFILL_TOKENS = 16384  # run at once; more would only need more memory
GPU_PADDING = 64  # prompts are padded to multiples of this on a GPU: cuDNN plans attention anew for every length
OnTokens = Callable[[list[int | None]], None]
"""Called once per step with the new token of each row, None for rows that have ended."""


def generate(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    eos: Collection[int] = (),
    on_tokens: OnTokens | None = None,
    steppers: Steppers | None = None,
    graph: bool | None = None,
) -> list[list[int]]:
    """Continue prompts, which may differ in length.

    Args:
        decoder: what computes.
        prompts: token ids of each row. Where the decoder's prefix stands for BOS, each begins with it.
        max_new_tokens: at most so many.
        sampling: how tokens are chosen; None: the likeliest.
        eos: tokens that end a row; they are part of its result.
        on_tokens: told of every step, in order, as its burst arrives.
        steppers: keeps cache and graph between calls; None: made for this one.
        graph: run decode steps as a CUDA graph; None: on CUDA, in the 16-bit dtypes that the kernels compute in.

    Returns:
        The new tokens of each row, up to and with its first `eos`.

    Raises:
        InputError: an empty prompt, one that does not begin with BOS though it must, or more tokens than positions.
    """
    sampling = sampling or Sampling()
    if not prompts or max_new_tokens < 1:
        raise InputError(f"{len(prompts)} prompts and {max_new_tokens} new tokens: there is nothing to generate")
    rows = [_own_tokens(decoder, list(prompt), number) for number, prompt in enumerate(prompts)]
    start, longest = decoder.prefix_tokens, max(len(row) for row in rows)
    positions = decoder.shape.positions
    # The last token that is chosen is not run, so it needs no slot.
    total = start + longest + max_new_tokens - 1
    if total > positions:
        raise InputError(
            f"the longest prompt and {max_new_tokens} new tokens need {total} positions, the model has {positions}; "
            "ask for fewer tokens, or shorten the prompt"
        )
    width = _padded(start + longest, decoder.shape.slots, decoder.device) - start
    if graph is None:
        graph = decoder.device.type == "cuda" and decoder.dtype in (torch.bfloat16, torch.float16)
    steppers = steppers or Steppers(decoder)
    # Buffers outlive this call: they must be ordinary tensors even if it is made in inference mode.
    with torch.inference_mode(False), torch.no_grad(), _on(decoder.device):
        stepper = steppers.get(len(rows), max(total, start + width), sampling.kind, graph)
        stepper.begin(sampling, max_new_tokens)
        stepper.take(prefill(decoder, rows, stepper.cache, width))
        return _write(stepper, max_new_tokens, frozenset(eos), on_tokens)


@torch.no_grad()
def prefill(decoder: Decoder, rows: Sequence[Sequence[int]], cache: KVCache, width: int | None = None) -> Tensor:
    """Run whole prompts (without the prefix's tokens) into a cleared cache, in pieces if they are many.

    Args:
        decoder: what computes.
        rows: tokens of each row; may be empty where a prefix is stored.
        cache: one row each.
        width: columns to run; None: the longest row's.

    Returns:
        Logits (B, vocabulary) of what follows each row.
    """
    width = max(len(row) for row in rows) if width is None else width
    tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int64)
    tokens = tokens.to(decoder.device)
    counts = torch.tensor([len(row) for row in rows], dtype=torch.int64).to(decoder.device)
    together = max(1, PREFILL_TOKENS // max(width, 1))
    logits = torch.cat(
        [
            _prefill_rows(decoder, tokens[i : i + together], counts[i : i + together], cache.rows(i, i + together))
            for i in range(0, len(rows), together)
        ]
    )
    if any(not row for row in rows):
        logits = torch.where(counts[:, None] == 0, decoder.logits_of_prefix(), logits)
    cache.lengths.copy_(counts + decoder.prefix_tokens)
    return logits


def _prefill_rows(decoder: Decoder, tokens: Tensor, counts: Tensor, cache: KVCache) -> Tensor:
    """Some rows, in as many pieces as their length asks for; later pieces read the earlier ones from the cache."""
    batch, width = tokens.shape
    logits = torch.zeros(batch, decoder.head.shape[0], dtype=decoder.dtype, device=decoder.device)
    for begin in range(0, width, PREFILL_TOKENS):
        piece = tokens[:, begin : begin + PREFILL_TOKENS]
        new = decoder.prefill(piece, cache, counts - begin, decoder.prefix_tokens + begin if begin else None)
        ends_here = (counts > begin) & (counts <= begin + piece.shape[1])
        logits = new if width <= PREFILL_TOKENS else torch.where(ends_here[:, None], new, logits)
    return logits


def _write(stepper: Stepper, steps: int, eos: frozenset[int], on_tokens: OnTokens | None) -> list[list[int]]:
    """Advance until all rows have ended or `steps` tokens are there; the first one is already."""
    text = _Text(stepper.cache.batch, eos, on_tokens)
    arriving: deque[_Arrival] = deque([_Arrival(stepper.history[:1])])
    most = BURST if stepper.history.device.type == "cuda" else 1
    begun = 1
    while begun < steps and not text.ended:
        burst = min(most, steps - begun)
        for _ in range(burst):
            stepper.advance()
        arriving.append(_Arrival(stepper.history[begun : begun + burst]))
        begun += burst
        text.add(arriving.popleft().tokens())
    while arriving and not text.ended:
        text.add(arriving.popleft().tokens())
    return text.rows


class _Arrival:
    """Tokens (steps, B) on their way to the host, beside what the device does next."""

    def __init__(self, source: Tensor) -> None:
        self._event = None
        if source.device.type != "cuda":
            self._host = source
            return
        self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        self._host.copy_(source, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def tokens(self) -> list[list[int]]:
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


class _Text:
    """What the rows have written so far."""

    def __init__(self, batch: int, eos: frozenset[int], on_tokens: OnTokens | None) -> None:
        self.rows: list[list[int]] = [[] for _ in range(batch)]
        self._eos, self._on_tokens = eos, on_tokens
        self._writing = [True] * batch

    @property
    def ended(self) -> bool:
        return not any(self._writing)

    def add(self, steps: list[list[int]]) -> None:
        for step in steps:
            if self.ended:
                return
            if self._on_tokens is not None:
                self._on_tokens([token if writing else None for token, writing in zip(step, self._writing)])
            for number, token in enumerate(step):
                if self._writing[number]:
                    self.rows[number].append(token)
                    self._writing[number] = token not in self._eos


def _own_tokens(decoder: Decoder, prompt: list[int], number: int) -> list[int]:
    """A prompt without what the prefix stands for."""
    prefix = decoder.prefix
    if prefix is None or not prefix.spec.replaces_bos:
        if not prompt:
            raise InputError(f"prompt {number} is empty; begin with at least one token")
        return prompt
    bos = prefix.spec.tokens[0]
    if prompt[:1] != [bos]:
        found = f"begins with token {prompt[0]} instead of BOS ({bos})" if prompt else "is empty"
        raise InputError(
            f"prompt {number} {found}; this model's stored prefix stands for BOS: use the checkpoint's own tokenizer"
        )
    return prompt[1:]


def _padded(length: int, most: int, device: torch.device) -> int:
    """Slots, `most` at most, after a prefill of padded prompts."""
    return min(-(-length // GPU_PADDING) * GPU_PADDING, most) if device.type == "cuda" else length


def _on(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
