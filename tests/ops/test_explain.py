"""explain: every op has a backend and a reason, everywhere."""

from importlib import import_module

import pytest
import torch

from mergequant import ops
from mergequant.errors import KernelError


def registered() -> set[str]:
    """Names of all ops that the package has registered with torch."""
    return {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "mergequant::" in name
    }


@pytest.mark.parametrize("architecture", [None, *ops.ARCHITECTURES])
def test_explain_when_any_architecture_expect_every_op_once(architecture: str | None) -> None:
    choices = ops.explain(architecture)
    names = [choice.op for choice in choices]
    assert len(registered()) >= 7
    assert sorted(names) == sorted(registered())
    assert all(choice.backend and choice.reason for choice in choices)
    assert {choice.architecture for choice in choices} == {architecture or choices[0].architecture}


@pytest.mark.parametrize("architecture", ["sm_70", "cuda", "", "CPU"])
def test_explain_when_architecture_is_unknown_expect_error_that_lists_the_known(architecture: str) -> None:
    with pytest.raises(KernelError, match="sm_90"):
        ops.explain(architecture)


def test_explain_when_the_cpu_product_saturates_expect_it_to_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {choice.op: choice.backend for choice in ops.explain("cpu")}
    module = import_module("mergequant.ops.int_matmul")  # the function of this name hides the module
    monkeypatch.setattr(module, "_cpu_product_is_exact", lambda: not before["int8_linear"].startswith("torch"))
    after = {choice.op: choice.backend for choice in ops.explain("cpu")}
    assert before["int8_linear"] != after["int8_linear"]
