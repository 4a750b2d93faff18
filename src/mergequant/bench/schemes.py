"""What a scheme is to the code that times it, so that bf16, fp8 and integers are treated alike."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from mergequant.bench.timing import Call
from mergequant.runtime import DecoderShape

__all__ = ["Job", "Scheme"]


@dataclass(frozen=True)
class Job:
    """Work that is ready to be timed, with everything that it needs on the device.

    Attributes:
        run: does it once; it can be called again and again and does the same each time.
        kernels: what it launches, for the reader.
        cache_bytes: of keys and values.
        holds: tensors that live as long as the job.
    """

    run: Call
    kernels: tuple[str, ...]
    cache_bytes: int
    holds: tuple[Any, ...] = ()


class Scheme(Protocol):
    """A decoder of one shape with random weights in one number format.

    Attributes:
        name: "bf16", "fp8", "w4a8".
        kind: the rate of `Ceilings.rates` that bounds its products.
        shape: of the decoder.
        weight_bits: bits of a weight of the linear layers.
        caches: bits of cached keys and values that it offers.
        weight_bytes: bytes that its weights take, with embedding and head.
        notes: what a reader of its figures must know; grows while jobs are prepared.
    """

    name: str
    kind: str
    shape: DecoderShape
    weight_bits: int
    caches: tuple[int, ...]
    notes: list[str]

    @property
    def weight_bytes(self) -> int: ...

    def prefill(self, batch: int, length: int, kv: int) -> Job:
        """(batch, length) random tokens to logits of the last ones, cache filled; one graph."""

    def decode(self, batch: int, context: int, kv: int) -> Job:
        """One step: a token for each sequence, attending to `context` positions with its own; one graph.

        Greedy sampling included. Every call does the same step again.
        """

    def generate(self, batch: int, prompt: int, new: int, kv: int) -> Job:
        """Prefill of `prompt` tokens and `new` greedy tokens for each sequence, the first from the prefill."""


Builder = Callable[[], Scheme]
