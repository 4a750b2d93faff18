import time

import pytest
import torch

from mergequant.bench.timing import Timing, capture, interleaved, ratio

CPU = torch.device("cpu")


def test_ratio_is_formed_within_passes() -> None:
    cool_then_hot, own = Timing((10.0, 12.0, 12.0)), Timing((5.0, 6.0, 6.0))
    assert ratio(cool_then_hot, own) == 2
    assert cool_then_hot.ms == 12
    assert cool_then_hot.spread == pytest.approx(1 / 6)
    assert cool_then_hot.scaled(0.5).passes == (5, 6, 6)


def test_calls_take_turns_and_each_pass_begins_with_another() -> None:
    order: list[str] = []

    def call(name: str) -> None:
        if order[-1:] != [name]:
            order.append(name)
        time.sleep(0.03)

    found = interleaved({name: lambda name=name: call(name) for name in "ab"}, CPU, 3)  # type: ignore[misc]
    # Estimates a b, then turns a b, b a, a b, neighbours that are equal counted once.
    assert "".join(order) == "ababab"
    assert {len(timing.passes) for timing in found.values()} == {3}
    assert found["a"].ms >= 30


def test_long_calls_run_once_a_turn_after_a_warm_one() -> None:
    count = 0

    def call() -> None:
        nonlocal count
        count += 1

    found = interleaved({"a": call}, CPU, 2, once=True)
    assert count == 3
    assert len(found["a"].passes) == 2


def test_capture_on_a_cpu_is_the_call_itself() -> None:
    def call() -> None: ...

    assert capture(call, CPU) is call
