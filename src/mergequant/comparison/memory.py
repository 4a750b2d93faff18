"""Peak memory of a part of a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["PeakMemory", "peak_memory"]

RESET_PEAK = "5"  # what proc(5) asks for in clear_refs
PROCESS = Path("/proc/self")


class PeakMemory:
    """Bytes at the highest point of a `with` block; None where the system does not tell."""

    bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[PeakMemory]:
    """Watch the peak of a `with` block.

    On a GPU: what torch had allocated there at most. On a CPU: the resident memory of the process, Python and libraries
    included, which only Linux measures for a part of a run.
    """
    peak = PeakMemory()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.bytes = torch.cuda.max_memory_allocated(device)
        return
    known = _reset()
    yield peak
    peak.bytes = _highest() if known else None


def _reset() -> bool:
    try:
        (PROCESS / "clear_refs").write_text(RESET_PEAK)
    except OSError:
        return False
    return True


def _highest() -> int | None:
    try:
        lines = (PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
