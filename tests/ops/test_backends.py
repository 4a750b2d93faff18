"""The choice of backends: forced by name, torch on a CPU, reasons for everything that does not run."""

import logging

import pytest
import torch

from mergequant import ops
from mergequant.errors import KernelError, UsageError
from mergequant.ops import backends
from mergequant.ops.cuda import compiler

CPU = torch.device("cpu")


@pytest.mark.parametrize("op", list(backends.BACKENDS))
def test_choose_when_on_a_cpu_expect_torch(op: str) -> None:
    assert backends.choose(op, CPU) == "torch"
    assert backends.BACKENDS[op][-1] == "torch"


def test_choose_when_forced_expect_that_backend_or_torch() -> None:
    with backends.use_backend("triton"):
        assert backends.choose("rmsnorm_quant", CPU) == "triton"
        assert backends.choose("int8_linear", CPU) == "torch"
    assert backends.choose("rmsnorm_quant", CPU) == "torch"


def test_choose_when_the_variable_is_misspelt_expect_the_known_names(monkeypatch) -> None:
    monkeypatch.setenv("MERGEQUANT_BACKEND", "tritn")
    with pytest.raises(UsageError, match=r"tritn.*cuda, triton, torch"):
        backends.choose("rmsnorm_quant", CPU)
    with pytest.raises(KernelError, match="tritn"), backends.use_backend("tritn"):
        pass


@pytest.mark.parametrize(
    ("op", "backend", "architecture", "words"),
    [
        ("tiled_linear", "cuda", "sm_80", "sm_90"),
        ("int4x4_linear", "cuda", "sm_90", "sm_80, sm_86, sm_89"),
        ("rmsnorm_quant", "triton", "cpu", "NVIDIA GPUs"),
        ("rmsnorm_quant", "triton", "sm_75", "sm_80 or newer"),
    ],
)
def test_reason_when_a_backend_does_not_run_expect_it_named(op, backend, architecture, words) -> None:
    assert words in (backends.reason_against(op, backend, architecture) or "")


def test_explain_when_nvrtc_is_missing_expect_the_fallback_and_why(monkeypatch) -> None:
    monkeypatch.setattr(compiler, "unavailable", lambda: "NVRTC is missing; install `nvidia-cuda-nvrtc`")
    monkeypatch.setattr(backends, "_has_triton", lambda: True)
    choice = next(choice for choice in ops.explain("sm_90") if choice.op == "tiled_linear")
    assert choice.backend == "triton"
    assert "install `nvidia-cuda-nvrtc`" in choice.reason


def test_report_when_given_twice_expect_one_warning(caplog, monkeypatch) -> None:
    monkeypatch.setattr(backends, "_reported", {})
    with caplog.at_level(logging.WARNING, logger="mergequant"):
        for _ in range(2):
            backends.report_fallback("kv_attention", "head width 80 has no kernel")
    assert len(caplog.records) == 1
    assert backends.reports("kv_attention") == ["head width 80 has no kernel"]
