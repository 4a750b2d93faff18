"""Cut token windows out of data: seeded random ones for calibration, consecutive ones for evaluation.

Text is tokenized as one stream without special tokens. A window of `seqlen` tokens is BOS and `seqlen - 1` text tokens,
or `seqlen` text tokens without BOS. Where a tokenizer has no BOS but a class token (BERT), that one stands for it.
Windows are taken at non-overlapping slots of the stream, so that no two windows of one draw share a token; held-out
windows of a text moreover never repeat an n-gram of the calibration windows.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mergequant.data.overlap import NGRAM, ngram_hashes, refuse_overlap, sketch
from mergequant.data.sampling import sample_windows, stream_seed
from mergequant.data.sources import iterate_text
from mergequant.data.spec import DataLike, SelfSource, Source, TokenSource, as_data_spec
from mergequant.errors import DataError, OverlapError, UsageError

__all__ = ["Bos", "Windows", "check_seqlen", "draw_splits", "draw_windows", "head_windows"]

Bos = bool | Literal["auto"]

_PIECE = 1 << 16  # characters tokenized at a time; bounds memory, and long inputs are slow in some tokenizers
_MAX_TEXT = 1 << 26  # characters of one source that random draws look at


@dataclass(frozen=True, eq=False)
class Windows:
    """A set of token windows and where they come from.

    tokens: (N, T) int64. begins_with_bos: whether token 0 of each window is BOS, or an encoder's class token.
    stride: text tokens between the starts of consecutive windows if less than a window, else None.
    fingerprint: sha256 over shape and tokens. text_truncated: the source was longer than what draws look at.
    """

    tokens: torch.Tensor
    begins_with_bos: bool
    source: str
    seed: int
    fingerprint: str
    stride: int | None = None
    text_truncated: bool = False

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @property
    def seqlen(self) -> int:
        """Tokens per window, BOS included."""
        return self.tokens.shape[1]

    def provenance(self) -> dict[str, Any]:
        """What a checkpoint or a report records about this data, JSON-able."""
        return {
            "source": self.source,
            "samples": len(self),
            "seqlen": self.seqlen,
            "stride": self.stride,
            "seed": self.seed,
            "bos": self.begins_with_bos,
            "text_truncated": self.text_truncated,
            "fingerprint": self.fingerprint,
        }


def check_seqlen(seqlen: int, max_positions: int | None) -> None:
    """Raise `UsageError` when `seqlen` tokens are too few to predict anything, or more than the model takes."""
    if seqlen < 2:
        raise UsageError(f"--seqlen {seqlen}: a window needs at least 2 tokens.")
    if max_positions is not None and seqlen > max_positions:
        raise UsageError(
            f"--seqlen {seqlen}: the model takes at most {max_positions} positions (max_position_embeddings); "
            f"give --seqlen {max_positions} or less."
        )


def draw_windows(
    data: DataLike,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    bos: Bos = "auto",
    model: PreTrainedModel | None = None,
    exclude: Sequence[Windows] = (),
) -> Windows:
    """Draw `samples` random windows of `seqlen` tokens, non-overlapping, decided by `seed` alone.

    `model` is the float model, needed for `self` data only. Windows that share an n-gram with one of `exclude` are not
    drawn. Raises `DataError` when the data is too short (naming what would fit), `OverlapError` when it is long enough
    but repeats itself or `exclude`, `UsageError` for impossible numbers.
    """
    return _draw(data, tokenizer, counts=(samples,), seqlen=seqlen, seed=seed, bos=bos, model=model, exclude=exclude)[0]


def draw_splits(
    data: DataLike,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    held_out: int,
    seqlen: int,
    seed: int,
    bos: Bos = "auto",
    model: PreTrainedModel | None = None,
) -> tuple[Windows, Windows]:
    """Draw calibration windows and held-out windows that share no token position and no n-gram.

    The calibration windows are those that `draw_windows` gives for the same seed. Raises as `draw_windows`.
    """
    first, second = _draw(
        data, tokenizer, counts=(samples, held_out), seqlen=seqlen, seed=seed, bos=bos, model=model, exclude=()
    )
    return first, second


def head_windows(
    data: DataLike,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int | None,
    seqlen: int,
    bos: Bos = "auto",
    stride: int | None = None,
    model: PreTrainedModel | None = None,
    seed: int = 0,
) -> Windows:
    """Consecutive windows from the start of the text, for evaluation; `samples=None` takes all whole windows.

    With `stride` s each window starts s text tokens after the one before and thus repeats its context; score then only
    the last s tokens of all but the first. `model` and `seed` are used by `self` data only, and give other sequences
    than `draw_windows` for every pair of seeds. Raises as `draw_windows`.
    """
    _check_counts(seqlen, samples)
    spec, start, width = _prepare(data, tokenizer, seqlen, bos)
    step = width if stride is None else stride
    if not 1 <= step <= width:
        raise UsageError(f"--stride {step}: must be between 1 and {width}, the text tokens of a window of {seqlen}.")
    counts = [None] * len(spec.parts) if samples is None else spec.share(samples)
    blocks = []
    for part, count in zip(spec.parts, counts, strict=True):
        if count == 0:
            continue
        if isinstance(part.source, TokenSource):
            blocks.append(_given_windows(part.source, count, seqlen))
        elif isinstance(part.source, SelfSource):
            if count is None:
                raise UsageError("--data self has no end: give --samples, the number of windows to sample.")
            float_model = _need_model(model, part.source)
            own_seed = stream_seed(seed, "evaluation")
            blocks.append(sample_windows(float_model, tokenizer, count, seqlen, own_seed, bos=start is not None))
        else:
            needed = None if count is None else width + (count - 1) * step
            stream, _ = _token_stream(part.source, tokenizer, needed, limit=None)
            available = 0 if len(stream) < width else (len(stream) - width) // step + 1
            if available < (count or 1):
                raise _too_short(
                    part.source, len(stream), need=needed or width, fits=available, samples=count or 1, seqlen=seqlen
                )
            windows = stream.unfold(0, width, step)[: count or available]
            blocks.append(_with_start(windows, start))
    tokens = torch.cat(blocks)
    return _windows(tokens, start, str(spec), seed, stride=step if step < width else None)


def _draw(
    data: DataLike,
    tokenizer: PreTrainedTokenizerBase,
    *,
    counts: tuple[int, ...],
    seqlen: int,
    seed: int,
    bos: Bos,
    model: PreTrainedModel | None,
    exclude: Sequence[Windows],
) -> list[Windows]:
    """Draw several mutually disjoint sets of windows at once; the first set does not depend on the others' sizes."""
    _check_counts(seqlen, counts[0])
    if any(count < 0 for count in counts):
        raise UsageError(f"Number of held-out windows is {min(counts)}; give 0 or more.")
    spec, start, width = _prepare(data, tokenizer, seqlen, bos)
    shares = [spec.share(count) for count in counts]
    sets: list[list[torch.Tensor]] = [[] for _ in counts]
    truncated = False
    for index, part in enumerate(spec.parts):
        wanted = [share[index] for share in shares]
        if not any(wanted):
            continue
        if isinstance(part.source, TokenSource):
            given = _given_windows(part.source, None, seqlen)
            if len(given) < sum(wanted):
                counted = " + ".join(map(str, wanted))
                raise DataError(
                    f"data {part.source}: {counted} windows are needed, the held-out ones among them; "
                    "give more windows or fewer --samples."
                )
            candidates = given[torch.randperm(len(given), generator=_generator(seed, index))]
        elif isinstance(part.source, SelfSource):
            float_model = _need_model(model, part.source)
            # Independent draws of one distribution: a chance repetition is no leak, so nothing is passed over here.
            for k, count in enumerate(wanted):
                if count:
                    own_seed = stream_seed(seed, f"draw {k}")
                    keep_bos = start is not None
                    sets[k].append(sample_windows(float_model, tokenizer, count, seqlen, own_seed, bos=keep_bos))
            continue
        else:
            stream, cut = _token_stream(part.source, tokenizer, needed=None, limit=_MAX_TEXT)
            truncated = truncated or cut
            slots = len(stream) // width
            if slots < sum(wanted):
                raise _too_short(
                    part.source, len(stream), need=sum(wanted) * width, fits=slots, samples=sum(wanted), seqlen=seqlen
                )
            generator = _generator(seed, index)
            # The slots start at a random phase, so that two seeds do not always cut at the same places.
            phase = int(torch.randint(len(stream) - slots * width + 1, (1,), generator=generator))
            order = torch.randperm(slots, generator=generator)
            candidates = _with_start(stream[phase : phase + slots * width].view(slots, width)[order], start)
        taken = [*(w.tokens for w in exclude)]
        for k, count in enumerate(wanted):
            chosen, candidates = _take(candidates, count, taken, part.source)
            sets[k].append(chosen)
            taken.append(chosen)
    result = []
    for k, blocks in enumerate(sets):
        tokens = torch.cat(blocks) if blocks else torch.empty((0, seqlen), dtype=torch.int64)
        if len(blocks) > 1:  # parts of a mix are interleaved, so that any prefix of the windows is a mix too
            tokens = tokens[torch.randperm(len(tokens), generator=_generator(seed, -1 - k))]
        result.append(_windows(tokens, start, str(spec), seed, text_truncated=truncated))
    for a, left in enumerate(result):  # parts of a mix may be copies of each other
        for right in [*result[a + 1 :], *exclude]:
            if len(left) and len(right):
                ngram = _ngram(left.tokens)
                names = ("calibration", "held-out") if right not in exclude else ("drawn", "excluded")
                refuse_overlap(names[0], sketch(left.tokens, ngram=ngram), names[1], sketch(right.tokens, ngram=ngram))
    return result


def _take(
    candidates: torch.Tensor, count: int, taken: Sequence[torch.Tensor], source: Source
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the first `count` candidates that share no n-gram with `taken`; also give the candidates that remain."""
    taken = [tokens for tokens in taken if len(tokens)]
    if not taken or count == 0:
        if len(candidates) < count:
            raise DataError(
                f"data {source}: has {len(candidates)} windows left, {count} are needed; give fewer --samples."
            )
        return candidates[:count], candidates[count:]
    ngram = _ngram(candidates)
    known = np.unique(np.concatenate([ngram_hashes(tokens, ngram).ravel() for tokens in taken]))
    chosen: list[int] = []
    position = 0
    while len(chosen) < count and position < len(candidates):
        chunk = candidates[position : position + max(64, 2 * count)]
        fresh = ~np.isin(ngram_hashes(chunk, ngram), known).any(axis=1)
        chosen.extend(position + int(i) for i in np.flatnonzero(fresh)[: count - len(chosen)])
        position += len(chunk)
    if len(chosen) < count:
        raise OverlapError(
            f"data {source}: of {len(candidates)} windows only {len(chosen)} share no {ngram}-token sequence with the "
            f"windows that are already used, {count} are needed: the text repeats itself or is too short. "
            "Give more text, fewer --samples or a smaller --seqlen."
        )
    rest = candidates[max(chosen) + 1 :]  # passed-over windows are repeats and stay unused
    return candidates[torch.tensor(chosen)], rest


def _ngram(tokens: torch.Tensor) -> int:
    return max(min(NGRAM, tokens.shape[1] - 1), 1)


def _prepare(data: DataLike, tokenizer: PreTrainedTokenizerBase, seqlen: int, bos: Bos) -> tuple[Any, int | None, int]:
    """The parsed spec, the BOS id to put first (or None), and the text tokens per window."""
    spec = as_data_spec(data)
    token: int | None = getattr(tokenizer, "bos_token_id", None)
    if token is None:  # an encoder's tokenizer: texts begin with the class token
        token = getattr(tokenizer, "cls_token_id", None)
    if bos is True and token is None:
        raise UsageError("bos=True, but the tokenizer has no BOS or class token; use bos='auto' or bos=False.")
    if any(isinstance(part.source, TokenSource) for part in spec.parts):
        first = [part.source.tokens[:, 0] for part in spec.parts if isinstance(part.source, TokenSource)]
        token = token if token is not None and bool((torch.cat(first) == token).all()) else None
    elif bos is False:
        token = None
    return spec, token, seqlen - (token is not None)


def _check_counts(seqlen: int, samples: int | None) -> None:
    check_seqlen(seqlen, None)
    if samples is not None and samples < 1:
        raise UsageError(f"--samples {samples}: at least 1 window is needed.")


def _generator(seed: int, part: int) -> torch.Generator:
    return torch.Generator().manual_seed(stream_seed(seed, f"part {part}"))


def _need_model(model: PreTrainedModel | None, source: Source) -> PreTrainedModel:
    if model is None:
        raise UsageError(
            f"data {source}: sequences are sampled from the float model, but none is given; "
            "pass it (`mergequant eval DIR --against MODEL`) or use a text file."
        )
    return model


def _given_windows(source: TokenSource, count: int | None, seqlen: int) -> torch.Tensor:
    have, width = source.tokens.shape
    if width != seqlen or have < (count or 1):
        raise DataError(f"data {source}: {count or 1} or more windows of {seqlen} tokens are needed.")
    return source.tokens if count is None else source.tokens[:count]


def _pieces(fragments: Iterator[str]) -> Iterator[str]:
    """Regroup text into pieces of about 64 KiB that end after the last newline of a run, else before a space."""
    rest = ""
    for fragment in fragments:
        rest += fragment
        while len(rest) > _PIECE:
            cut = _PIECE
            while cut > _PIECE // 2 and not (rest[cut - 1] == "\n" and rest[cut] != "\n"):
                cut -= 1
            if cut == _PIECE // 2:
                space = rest.rfind(" ", _PIECE // 2, _PIECE)
                cut = space if space > 0 else _PIECE
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _token_stream(
    source: Source, tokenizer: PreTrainedTokenizerBase, needed: int | None, limit: int | None
) -> tuple[torch.Tensor, bool]:
    """Tokenize a source as one stream (L,) int64, stopping after `needed` tokens or `limit` characters.

    Also says whether `limit` cut the text.
    """
    parts: list[torch.Tensor] = []
    have = read = 0
    for piece in _pieces(iterate_text(source)):
        if limit is not None and read + len(piece) > limit:
            return torch.cat(parts), True
        ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        parts.append(torch.tensor(ids, dtype=torch.int64))
        have, read = have + len(ids), read + len(piece)
        if needed is not None and have >= needed:
            break
    return (torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)), False


def _with_start(windows: torch.Tensor, start: int | None) -> torch.Tensor:
    if start is None:
        return windows.contiguous()
    return torch.cat([torch.full((len(windows), 1), start), windows], dim=1)


def _too_short(source: Source, have: int, *, need: int, fits: int, samples: int, seqlen: int) -> DataError:
    """`fits`: windows of `seqlen` that the `have` tokens allow; `samples`: windows asked for, with held-out ones."""
    width = have // samples
    advice = [f"--samples {fits}"] if fits else []
    advice += [f"--seqlen {width}"] if width >= 2 else []
    return DataError(
        f"data {source}: too short: {have} tokens, but {samples} windows of {seqlen} tokens need {need}; "
        f"give more text{''.join(f' or {a}' for a in advice)}."
    )


def _windows(
    tokens: torch.Tensor,
    start: int | None,
    source: str,
    seed: int,
    *,
    stride: int | None = None,
    text_truncated: bool = False,
) -> Windows:
    tokens = tokens.contiguous()
    digest = hashlib.sha256(f"{tuple(tokens.shape)}".encode() + tokens.numpy().astype("<i8").tobytes()).hexdigest()
    windows = Windows(tokens, start is not None, source, seed, digest, stride)
    return replace(windows, text_truncated=text_truncated)
