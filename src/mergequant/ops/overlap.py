"""Overlapped launches: a kernel may start while the one ahead of it still runs (programmatic dependent launch, sm_90).

An overlapped kernel loads its constants (multipliers, gains, gather indices), then waits for the kernel ahead of it,
then reads activations and writes. In a captured decode step that hides the launch and the first trip to memory. It asks
for one thing: constants were written long before. A multiplier that the very last kernel computed could be read too
early, so ops called one by one do not overlap; the runtime, whose constants are the loaded checkpoint, asks for it.
"""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache

import torch

__all__ = ["overlapping", "overlaps"]

LEAST_CAPABILITY = 9  # compute capability that knows griddepcontrol

_asked: ContextVar[bool] = ContextVar("mergequant_overlap", default=False)


@contextlib.contextmanager
def overlapping(enabled: bool = True) -> Iterator[None]:
    """Let the kernels launched inside the `with` overlap. Every constant they take must have been written before it."""
    token = _asked.set(enabled)
    try:
        yield
    finally:
        _asked.reset(token)


def overlaps(device: torch.device) -> bool:
    """Whether kernels launched here and now on a device are to overlap."""
    return _asked.get() and device.type == "cuda" and _capable(device)


@cache
def _capable(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= LEAST_CAPABILITY
