"""The decode loop's fixed buffers, and one CUDA graph of a whole step: from the last token to the next one.

A step is some hundred short kernels; started one by one from Python they would keep the device waiting. A graph starts
them all at once. It holds the addresses of everything it touches, so cache, tokens and random numbers stay where they
are, and it is replayed as often as a sequence of that batch size and capacity is written.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergequant.runtime.cache import KVCache
from mergequant.runtime.decoder import Decoder
from mergequant.runtime.sampling import Sampling, SamplingKind, choose, uniform_numbers

__all__ = ["Stepper", "Steppers", "capacity_for"]

FINE, COARSE = 256, 1024  # slots by which capacities grow, below and above the border
BORDER = 4096
WARM_UP = 2  # steps before capture: kernels are built, libraries make their workspaces


def capacity_for(slots: int, most: int) -> int:
    """Capacity, up to `most`, of the cache for so many slots: few different ones, so that graphs are found again."""
    grain = FINE if slots <= BORDER else COARSE
    return min(-(-slots // grain) * grain, most)


@dataclass(eq=False)
class _Buffers:
    tokens: Tensor  # int64 (B,), the newest of each row
    history: Tensor  # int64 (capacity, B), all that were chosen
    number: Tensor  # int64 (1,), how many
    uniform: Tensor  # float32 (capacity, B)
    temperature: Tensor  # float32 (1,)
    top_p: Tensor  # float32 (1,)


class Stepper:
    """Writes sequences of one batch size and capacity, token by token, without waiting for the device.

    Args:
        decoder: what computes.
        batch: rows.
        capacity: slots per row.
        kind: of sampling.
        graph: capture a step; the device must be CUDA.
    """

    def __init__(self, decoder: Decoder, batch: int, capacity: int, kind: SamplingKind, graph: bool) -> None:
        self.decoder, self.kind = decoder, kind
        self.cache: KVCache = decoder.new_cache(batch, capacity)
        device, most = decoder.device, self.cache.capacity
        self._buffers = _Buffers(
            torch.zeros(batch, dtype=torch.int64, device=device),
            torch.zeros(most, batch, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.zeros(most, batch, device=device, dtype=torch.float32),
            torch.ones(1, device=device, dtype=torch.float32),
            torch.ones(1, device=device, dtype=torch.float32),
        )
        self._graph: torch.cuda.CUDAGraph | None = None
        if graph:
            self._capture()

    @property
    def history(self) -> Tensor:
        """int64 (capacity, B): the tokens chosen so far, in rows."""
        return self._buffers.history

    def begin(self, sampling: Sampling, steps: int) -> None:
        """Forget everything, and draw the random numbers of at most `steps` steps."""
        buffers = self._buffers
        self.decoder.clear(self.cache)
        buffers.number.zero_()
        if not self.kind.greedy:
            buffers.uniform[:steps].copy_(uniform_numbers(sampling.seed, steps, self.cache.batch))
            buffers.temperature.fill_(sampling.temperature)
            buffers.top_p.fill_(sampling.top_p)

    @torch.no_grad()
    def take(self, logits: Tensor) -> None:
        """Choose the next token of each row from logits (B, vocabulary)."""
        buffers = self._buffers
        uniform = buffers.uniform.index_select(0, buffers.number).squeeze(0)
        buffers.tokens.copy_(choose(logits, self.kind, uniform, buffers.temperature, buffers.top_p))
        buffers.history.index_copy_(0, buffers.number, buffers.tokens[None])
        buffers.number += 1

    def advance(self) -> None:
        """Run the newest tokens and choose the ones that follow."""
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def _step(self) -> None:
        self.take(self.decoder.step(self._buffers.tokens, self.cache))

    def _capture(self) -> None:
        self.decoder.clear(self.cache)
        aside = torch.cuda.Stream(self.decoder.device)
        aside.wait_stream(torch.cuda.current_stream(self.decoder.device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                self._step()
        torch.cuda.current_stream(self.decoder.device).wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._graph = graph


class Steppers:
    """Keeps the last stepper, since its cache is large: the next request of its kind finds graph and memory ready."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._known: tuple[tuple[Any, ...], Stepper] | None = None

    def get(self, batch: int, slots: int, kind: SamplingKind, graph: bool) -> Stepper:
        """A stepper for `batch` rows of at least `slots` slots."""
        key = (batch, capacity_for(slots, self.decoder.shape.slots), kind, graph)
        if self._known is None or self._known[0] != key:
            self._known = None  # its memory first
            self._known = (key, Stepper(self.decoder, batch, key[1], kind, graph))
        return self._known[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> "Steppers":
        # Graphs cannot be copied, and hold addresses that a copy must not share.
        import copy

        return Steppers(copy.deepcopy(self.decoder, memo))
