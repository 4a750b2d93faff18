"""register_op: ops without the costs of custom_op, and with what it gives."""

import inspect
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mergequant import ops


def arguments() -> tuple[Any, ...]:
    codes = torch.randint(-8, 8, (3, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    weight = torch.randint(-8, 8, (5, 64), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    return codes, weight, torch.rand(5), None, None, torch.float32


def test_op_when_compiled_expect_one_graph_and_the_same_result() -> None:
    values = arguments()
    compiled = torch.compile(lambda codes: ops.int8_linear(codes, *values[1:]) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values[0]), ops.int8_linear(*values) * 2)


def test_op_when_looked_at_expect_signature_documentation_and_dispatcher_entry() -> None:
    assert list(inspect.signature(ops.int8_linear).parameters)[:2] == ["codes", "weight"]
    assert "int8 (..., width)" in (ops.int8_linear.__doc__ or "")
    assert ops.int8_linear.__name__ == "int8_linear"
    assert torch.ops.mergequant.int8_linear.default is ops.int8_linear.overload
    values = arguments()
    by_name = dict(zip(inspect.signature(ops.int8_linear).parameters, values))
    assert torch.equal(ops.int8_linear(**by_name), ops.int8_linear(*values))


def test_op_when_called_expect_less_overhead_than_the_ops_own_time() -> None:
    """A tenth of a millisecond would show a Python-level autograd wrapper, or tracing, coming back."""
    values = arguments()

    def least(call: Callable[[], Tensor]) -> float:
        times = []
        for _ in range(200):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return min(times)

    with torch.no_grad():
        assert least(lambda: ops.int8_linear(*values)) - least(lambda: ops.int8_linear.body(*values)) < 1e-4
