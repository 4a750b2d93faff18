"""The decoders that mergequant is measured against: bf16 and fp8, made as fast as their libraries allow.

Both run one CUDA graph for a prefill and one for a decode step, fused q/k/v and gate/up products, fused elementwise
kernels (`kernels.py`), a static bf16 key/value cache, cuDNN attention in prefill and, in decode, the fastest of cuDNN,
flash and a split Triton kernel, chosen for each cell by trying them. The LM head, bf16, sees the last token only.

- **bf16**: `torch.mm`, that is cuBLAS.
- **fp8**: `torch._scaled_mm` on float8_e4m3fn with a scale per weight row and a dynamic scale per token, found inside
  the norm, SwiGLU and attention-output kernels; rows padded to 16.

On an H200 eager transformers takes 1.4 times as long for a prompt of 2048 tokens, several times as long for a token.
"""

import weakref

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from mergequant.bench.float_decoder import Attend, FloatDecoder, State, library_attention
from mergequant.bench.schemes import Job
from mergequant.bench.timing import Call, capture, one_time
from mergequant.runtime import DecoderShape

__all__ = ["CachePool", "FloatScheme"]

TRIED_LAYERS = 8  # caches that attention is tried on, so that it does not read from L2
BUCKET = 64  # tokens that share one captured step in generation
FP8_NOTE = (
    "fp8 is torch._scaled_mm with row scales: at few rows cuBLAS reads fp8 weights at 1 to 3 TB/s, so this baseline is "
    "weak in decode; a better small-batch fp8 kernel would take about a quarter less time per step at batch 1"
)


class CachePool:
    """bf16 caches, (layers, 2, B, KV heads, capacity, D), shared by schemes whose cells are timed in turns.

    At batch 64 two of them would not fit. What is in them does not matter for time, so it may as well be the other's.
    """

    def __init__(self) -> None:
        self._kept: weakref.WeakValueDictionary[tuple[object, ...], Tensor] = weakref.WeakValueDictionary()

    def get(self, shape: DecoderShape, batch: int, capacity: int, device: torch.device) -> Tensor:
        """A cache of normal values, alive as long as someone holds it."""
        size = (shape.layers, 2, batch, shape.kv_heads, capacity, shape.head_width)
        cache = self._kept.get((size, device))
        if cache is None:
            cache = torch.empty(size, device=device, dtype=torch.bfloat16)
            for layer in cache:
                layer.normal_()
            self._kept[size, device] = cache
        return cache


class FloatScheme:
    """A float baseline as a `Scheme`."""

    caches: tuple[int, ...] = (16,)

    def __init__(self, shape: DecoderShape, fp8: bool, device: torch.device, positions: int, pool: CachePool) -> None:
        self.name = self.kind = "fp8" if fp8 else "bf16"
        self.shape, self.device, self.pool = shape, device, pool
        self.weight_bits = 8 if fp8 else 16
        self.decoder = FloatDecoder(shape, fp8, device, positions)
        self.notes = [FP8_NOTE] if fp8 else []

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.decoder.weight_bytes

    def prefill(self, batch: int, length: int, kv: int) -> Job:
        """See `Scheme`."""
        state = self._state(batch, length)
        tokens = torch.randint(self.shape.vocabulary, (batch, length), device=self.device)
        kept: list[Tensor] = []  # the graph writes into the logits: they must live

        def run() -> None:
            kept[:] = [self.decoder.prefill(tokens, state)]

        return Job(
            capture(run, self.device),
            self._kernels("torch attention (cuDNN first)"),
            state.cache.nbytes,
            (tokens, state, kept),
        )

    def decode(self, batch: int, context: int, kv: int) -> Job:
        """See `Scheme`."""
        state = self._state(batch, context)
        name = self._choose_attention(state, context)
        state.lengths.fill_(context - 1)

        def run() -> None:
            state.tokens.copy_(self.decoder.step(state).argmax(-1))

        return Job(capture(run, self.device), self._kernels(name), state.cache.nbytes, (state,))

    def generate(self, batch: int, prompt: int, new: int, kv: int) -> Job:
        """See `Scheme`. A step is captured for every `BUCKET` tokens and attends to the middle of its range: as many
        bytes over the whole as with the exact lengths, which cuDNN would want a graph each for."""
        capacity = prompt + new
        state = self._state(batch, capacity)
        name = self._choose_attention(state, prompt + new // 2)
        tokens = torch.randint(self.shape.vocabulary, (batch, prompt), device=self.device)

        def begin() -> None:
            state.tokens.copy_(self.decoder.prefill(tokens, state).argmax(-1))
            state.lengths.fill_(prompt)

        def step() -> None:
            state.tokens.copy_(self.decoder.step(state).argmax(-1))
            state.lengths.add_(1)

        prefill = capture(begin, self.device)
        steps: list[tuple[Call, int]] = []
        for first in range(1, new, BUCKET):
            count = min(BUCKET, new - first)
            state.context = prompt + first + count // 2
            state.lengths.fill_(prompt)
            steps.append((capture(_fixed(step, state, state.context), self.device), count))

        def run() -> None:
            prefill()
            for replay, count in steps:
                for _ in range(count):
                    replay()

        return Job(run, self._kernels(name), state.cache.nbytes, (tokens, state))

    def _state(self, batch: int, capacity: int) -> State:
        cache = self.pool.get(self.shape, batch, capacity, self.device)
        lengths = torch.zeros(batch, device=self.device, dtype=torch.int32)
        tokens = torch.randint(self.shape.vocabulary, (batch,), device=self.device)
        return State(tokens, lengths, cache, self.decoder.kernels.decode_attention, capacity)

    def _choose_attention(self, state: State, context: int) -> str:
        """Set `state.attend` to the fastest for this cell, and name it."""
        own = "triton attention" if self.device.type == "cuda" else "torch attention"
        if self.device.type != "cuda":
            return own
        known: dict[str, Attend] = {
            "cuDNN attention": library_attention(SDPBackend.CUDNN_ATTENTION),
            "flash attention": library_attention(SDPBackend.FLASH_ATTENTION),
            own: self.decoder.kernels.decode_attention,
        }
        batch = state.tokens.shape[0]
        size = (batch, self.shape.heads, self.shape.head_width)
        queries = torch.randn(size, device=self.device, dtype=torch.bfloat16)
        found: dict[str, float] = {}
        for name, attend in known.items():

            def trial(attend: Attend = attend) -> None:
                for keys, values in state.cache[:TRIED_LAYERS].unbind(0):
                    attend(queries, keys, values, context)

            try:
                found[name] = one_time(capture(trial, self.device), self.device)
            except RuntimeError as error:  # a backend that does not take this shape
                self.notes.append(f"{self.name}: {name} does not run here ({str(error).splitlines()[0][:120]})")
        best = min(found, key=found.__getitem__)
        state.attend = known[best]
        return best

    def _kernels(self, attention: str) -> tuple[str, ...]:
        names = self.decoder.kernels.NAMES
        product = "torch._scaled_mm" if self.decoder.fp8 else "torch.mm"
        rows = (names["rows"],) if self.decoder.fp8 else ()
        return (product, attention, names["norm"], names["rope"], names["silu"], *rows)


def _fixed(step: Call, state: State, context: int) -> Call:
    """A step that attends to `context` positions."""

    def run() -> None:
        state.context = context
        step()

    return run
