"""Which kernel serves each layer, said once when an engine has loaded its weights."""

import logging
import re
from collections import Counter
from collections.abc import Iterable

from mergequant.integrations.vllm.served import Kernel

__all__ = ["Report", "summary"]

LOG = logging.getLogger("vllm.mergequant")  # vLLM's logger shows its children at level INFO


def summary(kernels: Iterable[Kernel]) -> list[str]:
    """A line for each kind of layer: names with their block's number left out, count, and what serves them."""
    counts: Counter[str] = Counter()
    for kernel in kernels:
        name = re.sub(r"\.\d+\.", ".*.", kernel.layer)
        served = f"{kernel.outputs} x {kernel.width}, {kernel.scheme}: {kernel.op} ({kernel.backend})"
        counts[f"{name}: {served}"] += 1
    return [f"{count} x {line}" for line, count in counts.items()]


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
