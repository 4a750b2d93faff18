"""mergequant's own decoder as a `Scheme`: integer products, quantized key/value cache, captured steps."""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mergequant.bench.baselines import CachePool
from mergequant.bench.schemes import Job
from mergequant.bench.timing import capture
from mergequant.errors import UsageError
from mergequant.ops import backends
from mergequant.ops.kv_layout import CAPACITY_MULTIPLE
from mergequant.runtime import Decoder, KVCache, KVFormat, Sampling, Stepper
from mergequant.runtime.parts import FloatNorm, FusedGate, ModuleLinear, Quantizer, QuantizingNorm, TiledLinear

__all__ = ["IntegerScheme", "tensors_of"]

KEY_RANGE = 4.0  # largest key or value that random scales can hold; no figure depends on it


class IntegerScheme:
    """A decoder of `mergequant.runtime`, with a cache of 16, 8 or 4 bits.

    Args:
        decoder: with random weights or those of a checkpoint.
        pool: 16-bit caches that are shared with the baselines.

    Raises:
        UsageError: linear layers that are not integer products, or of different bits.
    """

    kind = "int8"
    caches: tuple[int, ...] = (16, 8, 4)

    def __init__(self, decoder: Decoder, pool: CachePool) -> None:
        self.weight_bits = _weight_bits(decoder)
        self.name = f"w{self.weight_bits}a8"
        self.decoder, self.shape, self.pool = decoder, decoder.shape, pool
        self.device = decoder.device
        self.notes: list[str] = []
        self._known = set(_fallbacks())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        decoder = self.decoder
        storages = {t.data_ptr(): t.nbytes for t in tensors_of((decoder.layers, decoder.embedding, decoder.head))}
        return sum(storages.values())

    def prefill(self, batch: int, length: int, kv: int) -> Job:
        """See `Scheme`."""
        decoder = self._with_cache_of(kv)
        cache = self._filled_cache(decoder, batch, decoder.prefix_tokens + length)
        tokens = torch.randint(self.shape.vocabulary, (batch, length), device=self.device)
        kept: list[Tensor] = []  # the graph writes into the logits: they must live

        def run() -> None:
            kept[:] = [decoder.prefill(tokens, cache)]

        job = Job(capture(run, self.device), self._kernels("prefill"), _bytes(cache), (decoder, cache, tokens, kept))
        self._note_fallbacks()
        return job

    def decode(self, batch: int, context: int, kv: int) -> Job:
        """See `Scheme`."""
        decoder = self._with_cache_of(kv)
        cache = self._filled_cache(decoder, batch, context)
        tokens = torch.randint(self.shape.vocabulary, (batch,), device=self.device)

        def run() -> None:
            cache.lengths.fill_(context - 1)  # a step adds one; this takes it back
            tokens.copy_(decoder.step(tokens, cache, context).argmax(-1))

        job = Job(capture(run, self.device), self._kernels("decode"), _bytes(cache), (decoder, cache, tokens))
        self._note_fallbacks()
        return job

    def generate(self, batch: int, prompt: int, new: int, kv: int) -> Job:
        """See `Scheme`. The loop is that of `mergequant generate`."""
        decoder = self._with_cache_of(kv)
        sampling, graph = Sampling(), self.device.type == "cuda"
        stepper = Stepper(decoder, batch, _rounded(decoder.prefix_tokens + prompt + new), sampling.kind, graph)
        tokens = torch.randint(self.shape.vocabulary, (batch, prompt), device=self.device)

        def begin() -> None:
            stepper.take(decoder.prefill(tokens, stepper.cache))

        stepper.begin(sampling, new)
        prefill = capture(begin, self.device)

        def run() -> None:
            stepper.begin(sampling, new)
            prefill()
            for _ in range(new - 1):
                stepper.advance()

        self._note_fallbacks()
        return Job(run, self._kernels("decode"), _bytes(stepper.cache), (stepper, tokens))

    def _with_cache_of(self, bits: int) -> Decoder:
        """The same weights with a cache of `bits`; a checkpoint's own scales where they are for as many bits."""
        if self.decoder.kv.bits == bits:
            return self.decoder
        step = 1.0 if bits == 16 else KEY_RANGE / (2 ** (bits - 1) - 1)
        scale = torch.full_like(self.decoder.kv.key_scale, step)
        return replace(self.decoder, kv=KVFormat(bits, scale, scale))

    def _filled_cache(self, decoder: Decoder, batch: int, slots: int) -> KVCache:
        """A cache with arbitrary content."""
        if decoder.kv.bits == 16 and decoder.dtype == torch.bfloat16:
            both = self.pool.get(self.shape, batch, _rounded(slots), self.device)
            lengths = torch.zeros(batch, dtype=torch.int32, device=self.device)
            return KVCache([pair[0] for pair in both], [pair[1] for pair in both], lengths, decoder.kv)
        cache = decoder.new_cache(batch, slots)
        for tensor in (*cache.keys, *cache.values):
            if tensor.is_floating_point():
                tensor.normal_()
            else:
                tensor.random_(0, 256)
        return cache

    def _kernels(self, phase: str) -> tuple[str, ...]:
        found = [op for part in _parts_of(self.decoder.layers) for op in _ops_of(part, phase)]
        ops = dict.fromkeys([*found, "kv_append", *(["kv_attention"] if phase == "decode" else [])])
        names = [f"{op} ({backends.choose(op, self.device)})" for op in ops]
        return (*names, "torch attention (cuDNN first)") if phase == "prefill" else tuple(names)

    def _note_fallbacks(self) -> None:
        self.notes = [f"{self.name}: {found}" for found in _fallbacks() if found not in self._known]


def _fallbacks() -> list[str]:
    """What ops have reported in this process."""
    return [f"{op} fell back: {reason}" for op in backends.BACKENDS for reason in backends.reports(op)]


def _ops_of(part: Any, phase: str) -> tuple[str, ...]:
    """What a part of a layer calls. In decode, attention itself makes the codes of a quantizer that only scales."""
    if isinstance(part, Quantizer):
        kind = "dynamic_quant" if part.multiplier is None else "quant"
        if part.left is not None:
            return ("kronecker_dynamic_quant",)
        if part.rotates:
            return (f"hadamard_{kind}",)
        if part.scales_only and phase == "decode":
            return ()
        return (kind if part.multiplier is None else "static_quant",)
    names = {
        TiledLinear: "tiled_linear",
        FusedGate: "tiled_swiglu_quant",
        QuantizingNorm: "add_rmsnorm_quant",
        FloatNorm: "add_rmsnorm",
    }
    return (names[type(part)],) if type(part) in names else ()


def _weight_bits(decoder: Decoder) -> int:
    """Bits of all integer products of a decoder."""
    parts = list(_parts_of(decoder.layers))
    widths = {part.weight_bits for part in parts if isinstance(part, TiledLinear | FusedGate)}
    if len(widths) != 1 or any(isinstance(part, ModuleLinear) for part in parts):
        raise UsageError(
            "the checkpoint's linear layers are not all integer products of one width; measure one where "
            "they are, or a shape by name"
        )
    return widths.pop()


def _parts_of(item: Any) -> Iterator[Any]:
    """Nested dataclasses, from outside to inside."""
    if isinstance(item, list | tuple):
        for part in item:
            yield from _parts_of(part)
    elif is_dataclass(item):
        yield item
        yield from _parts_of([getattr(item, part.name) for part in fields(item)])


def tensors_of(item: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, dataclasses and modules."""
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, nn.Module):
        yield from item.state_dict(keep_vars=True).values()
    elif isinstance(item, list | tuple):
        for part in item:
            yield from tensors_of(part)
    elif is_dataclass(item):
        for part in fields(item):
            yield from tensors_of(getattr(item, part.name))


def _rounded(slots: int) -> int:
    return -(-slots // CAPACITY_MULTIPLE) * CAPACITY_MULTIPLE


def _bytes(cache: KVCache) -> int:
    return sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
