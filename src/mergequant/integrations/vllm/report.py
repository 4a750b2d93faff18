"""Which kernel serves each layer, and the cache, said once when an engine starts."""

import logging
import re
from collections import Counter
from collections.abc import Iterable

import torch

from mergequant.integrations.vllm.served import Kernel
from mergequant.ops import backends

__all__ = ["Report", "cache_summary", "summary"]

LOG = logging.getLogger("vllm.mergequant")  # vLLM's logger shows its children at level INFO


def summary(kernels: Iterable[Kernel]) -> list[str]:
    """A line for each kind of layer: names with their block's number left out, count, and what serves them."""
    counts: Counter[str] = Counter()
    for kernel in kernels:
        name = re.sub(r"\.\d+\.", ".*.", kernel.layer)
        served = f"{kernel.outputs} x {kernel.width}, {kernel.scheme}: {kernel.op} ({kernel.backend})"
        counts[f"{name}: {served}"] += 1
    return [f"{count} x {line}" for line, count in counts.items()]


def cache_summary(layers: int, bits: int, page: int, size: int, device: torch.device) -> str:
    """A line for a cache of ours: `page` tokens take `size` bytes in a layer."""
    served = ", ".join(f"{op} ({backends.choose(op, device)})" for op in ("kv_store", "kv_page_attention"))
    return f"keys and values of {layers} layers in {bits} bits, {size} bytes for {page} tokens of one: {served}"


class Report:
    """Collects the kernels of a model's layers as they are made ready."""

    def __init__(self) -> None:
        self.expected = 0
        self.kernels: dict[str, Kernel] = {}

    def expect(self) -> None:
        """One more layer will be made ready."""
        self.expected += 1

    def add(self, kernel: Kernel) -> None:
        """A layer is ready; the last one prints the summary."""
        self.kernels[kernel.layer] = kernel
        if len(self.kernels) == self.expected:
            for line in summary(self.kernels.values()):
                LOG.info("mergequant serves %s", line)
            slow = [kernel for kernel in self.kernels.values() if kernel.op == "linear"]
            if slow:
                LOG.warning(
                    "%d layers have float inputs: their weights are decoded, and take 16 bits in memory. For 4-bit "
                    "kernels: mergequant export DIR --format compressed-tensors --out DIR2",
                    len(slow),
                )
