"""Time of CUDA graphs, several schemes in turns.

A chip that is hot runs large products 10 % slower than one that is cool, and one scheme heats it for the next. So the
schemes take turns, in each pass another one begins, and a ratio is formed within a pass before the median over passes
is taken. On a CPU the same code runs without graphs.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

__all__ = ["Call", "Timing", "capture", "interleaved", "one_time", "ratio", "times"]

Call = Callable[[], object]

TURN = 60.0  # milliseconds of measured work in one turn of one scheme,
LEAST, MOST = 3, 25  # but so many calls at least and at most
WARM = 20.0  # milliseconds of the same work before it, so that clocks follow


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call: the median of each pass."""

    passes: tuple[float, ...]

    @property
    def ms(self) -> float:
        """Median over passes."""
        return statistics.median(self.passes)

    @property
    def spread(self) -> float:
        """Highest minus lowest pass, as a share of the median."""
        return (max(self.passes) - min(self.passes)) / self.ms

    def scaled(self, factor: float) -> "Timing":
        """The same with all times multiplied, for calls that hold several pieces of work."""
        return Timing(tuple(value * factor for value in self.passes))


def capture(call: Call, device: torch.device) -> Call:
    """Record what `call` launches and return what replays it; it runs once before, to compile and to settle libraries.

    Args:
        call: launches work on tensors that stay where they are; it must not wait for the device.
        device: where it runs.

    Returns:
        The replay, which keeps graph and memory alive. On a CPU `call` itself.
    """
    if device.type != "cuda":
        return call
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(kept: Call = call) -> None:  # a graph holds addresses; `call` holds the tensors that lie there
        graph.replay()

    return replay


def times(call: Call, device: torch.device, count: int) -> list[float]:
    """Milliseconds of `count` calls, each between two events."""
    if device.type != "cuda":
        return [_wall(call) for _ in range(count)]
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for begin, end in events:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) for begin, end in events]


def one_time(call: Call, device: torch.device, count: int = 3) -> float:
    """Median milliseconds of a few calls after a warm one: for choosing, not for reporting."""
    call()
    return statistics.median(times(call, device, count))


def interleaved(calls: Mapping[str, Call], device: torch.device, passes: int, once: bool = False) -> dict[str, Timing]:
    """Timings of calls that take turns.

    Args:
        calls: what to time, by name; all can run at any time.
        device: where they run.
        passes: how often everyone has a turn.
        once: a turn is one call without a warm one before it, for calls that take seconds.
    """
    if once:
        turns = [{name: times(call, device, 1)[0] for name, call in calls.items()} for _ in range(passes + 1)]
        return {name: Timing(tuple(turn[name] for turn in turns[1:])) for name in calls}  # the first one warms
    estimates = {name: max(times(call, device, 2)[-1], 1e-3) for name, call in calls.items()}
    found: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(passes):
        begin = turn % len(names)
        for name in names[begin:] + names[:begin]:
            estimate = estimates[name]
            for _ in range(max(1, min(MOST, int(WARM / estimate)))):
                calls[name]()
            count = max(LEAST, min(MOST, int(TURN / estimate)))
            found[name].append(statistics.median(times(calls[name], device, count)))
    return {name: Timing(tuple(values)) for name, values in found.items()}


def ratio(other: Timing, own: Timing) -> float:
    """How many times faster `own` is than `other`: the median of the passes' ratios."""
    return statistics.median(a / b for a, b in zip(other.passes, own.passes, strict=True))


def _wall(call: Call) -> float:
    started = time.perf_counter()
    call()
    return (time.perf_counter() - started) * 1e3
