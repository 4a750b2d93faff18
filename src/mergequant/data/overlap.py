"""Guard against measuring on what was calibrated on.

Token sets are compared by the hashes of their n-grams, without alignment, so that shifted windows of the same text are
found too. Only hashes divisible by a modulus are kept (Schleimer, Wilkerson & Aiken, "Winnowing: local algorithms for
document fingerprinting", SIGMOD 2003, section 2), which makes a sketch small enough to live in a checkpoint. Moduli are
powers of two, so that two sketches can always be brought to the coarser one.
"""

import base64
import binascii
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mergequant.errors import DataError, OverlapError

__all__ = ["Sketch", "ngram_hashes", "overlap", "refuse_overlap", "sketch", "sketch_from_json", "sketch_to_json"]

NGRAM = 32
MODULUS = 16
MAX_HASHES = 20_000
EXACT_BELOW = 4096  # sets with fewer n-grams are kept whole: a handful of sampled hashes would prove nothing

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so multiplication mod 2**64 loses nothing
Hashes = NDArray[np.uint64]


@dataclass(frozen=True, eq=False)
class Sketch:
    """What is kept of a set of windows.

    hashes: (K,) uint64, sorted, unique, each divisible by `modulus`.
    ngram: number of tokens in each hashed n-gram. modulus: a power of two.
    """

    hashes: Hashes
    ngram: int = NGRAM
    modulus: int = MODULUS

    def coarsened(self, modulus: int) -> Hashes:
        """The hashes that a coarser modulus would have kept."""
        return self.hashes[self.hashes % np.uint64(modulus) == 0]


def ngram_hashes(tokens: torch.Tensor, ngram: int) -> Hashes:
    """Hash every n-gram of each window: (N, T) int64 -> (N, T - ngram + 1) uint64. N-grams never span windows."""
    ids = tokens.detach().cpu().numpy().astype(np.uint64) + np.uint64(1)
    width = max(ids.shape[1] - ngram + 1, 0)
    value = np.zeros((ids.shape[0], width), dtype=np.uint64)
    for j in range(ngram if width else 0):
        value = value * _BASE + ids[:, j : j + width]
    # The low bits of a polynomial hash only see the low bits of the tokens; mix before they are used for sampling.
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def sketch(tokens: torch.Tensor, *, ngram: int | None = None) -> Sketch:
    """Sketch a set of windows (N, T) int64.

    `ngram` defaults to 32, or to T - 1 for shorter windows; pass the other sketch's `ngram` to compare with it.
    """
    if ngram is None:
        ngram = max(min(NGRAM, tokens.shape[1] - 1), 1)
    hashes = np.unique(ngram_hashes(tokens, ngram))
    modulus = 1 if hashes.size <= EXACT_BELOW else MODULUS
    while (kept := hashes[hashes % np.uint64(modulus) == 0]).size > MAX_HASHES:
        modulus *= 2
    return Sketch(kept, ngram, modulus)


def overlap(a: Sketch, b: Sketch) -> float:
    """Share (0 to 1) of a's n-grams that are also in b, as estimated from the sketches. 0 when a has none."""
    if a.ngram != b.ngram:
        raise DataError(f"Cannot compare sketches of {a.ngram}-grams and {b.ngram}-grams; sketch both with one length.")
    modulus = max(a.modulus, b.modulus)
    left = a.coarsened(modulus)
    return float(np.isin(left, b.coarsened(modulus)).mean()) if left.size else 0.0


def refuse_overlap(name_a: str, a: Sketch, name_b: str, b: Sketch, limit: float = 0.01) -> None:
    """Raise `OverlapError` when more than `limit` of the n-grams of either set are in the other."""
    share_a, share_b = overlap(a, b), overlap(b, a)
    if max(share_a, share_b) > limit:
        raise OverlapError(
            f"{share_a:.1%} of the {a.ngram}-token sequences of the {name_a} data are also in the {name_b} data "
            f"({share_b:.1%} the other way round; at most {limit:.1%} is allowed): a figure measured on it would "
            "flatter the model. Use another file, or another part of it."
        )


def sketch_to_json(value: Sketch) -> dict[str, Any]:
    """A sketch as a JSON-able dict; hashes are base64 of little-endian uint64."""
    data = base64.b64encode(value.hashes.astype("<u8").tobytes()).decode("ascii")
    return {"ngram": value.ngram, "modulus": value.modulus, "hashes": data}


def sketch_from_json(data: dict[str, Any]) -> Sketch:
    """The inverse of `sketch_to_json`. Raises `DataError` for a dict that is not a sketch."""
    try:
        raw = base64.b64decode(data["hashes"], validate=True)
        hashes = np.frombuffer(raw, dtype="<u8").astype(np.uint64)
        ngram, modulus = int(data["ngram"]), int(data["modulus"])
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise DataError(f"Stored data sketch cannot be read ({type(error).__name__}: {error}).") from error
    if ngram < 1 or modulus < 1:
        raise DataError(f"Stored data sketch has ngram {ngram} and modulus {modulus}; both must be positive.")
    return Sketch(hashes, ngram, modulus)
