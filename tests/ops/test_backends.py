"""The choice of backends: forced by name, torch on a CPU, reasons for everything that does not run."""

import logging
import shutil
import sysconfig
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch

from mergequant import ops
from mergequant.errors import KernelError, UsageError
from mergequant.ops import backends
from mergequant.ops.cuda import compiler

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ELEMENTWISE = ("rmsnorm_quant", "add_rmsnorm", "static_quant", "dynamic_quant", "silu_mul_quant")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Nothing chosen or reported yet, on an sm_90 with everything installed; what a test chooses is forgotten again."""
    monkeypatch.delenv("MERGEQUANT_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_reported", {})
    monkeypatch.setattr(backends, "_architecture", lambda device: "sm_90")
    monkeypatch.setattr(backends, "_has_triton", lambda: True)
    monkeypatch.setattr(backends, "_without_compiler", lambda: None)
    monkeypatch.setattr(compiler, "unavailable", lambda: None)
    backends._choose.cache_clear()
    yield monkeypatch
    backends._choose.cache_clear()


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder that is the whole search path of programs; no CC."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    backends._without_compiler.cache_clear()
    yield tmp_path
    backends._without_compiler.cache_clear()


def program(path: Path) -> None:
    """A file that could be run."""
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)


def headers(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let Python's headers be looked for in a folder."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(folder)})


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
        ("rmsnorm_quant", "cuda", "sm_75", "sm_80, sm_86"),
        ("rmsnorm_quant", "cuda", "cpu", "NVIDIA GPUs"),
    ],
)
def test_reason_when_a_backend_does_not_run_expect_it_named(op, backend, architecture, words) -> None:
    assert words in (backends.reason_against(op, backend, architecture) or "")


def test_explain_when_nvrtc_is_missing_expect_the_fallback_and_why(monkeypatch) -> None:
    monkeypatch.setattr(compiler, "unavailable", lambda: "NVRTC is missing; install `nvidia-cuda-nvrtc`")
    monkeypatch.setattr(backends, "_has_triton", lambda: True)
    monkeypatch.setattr(backends, "_without_compiler", lambda: None)
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


def test_choose_when_all_is_installed_expect_the_first_and_no_report(fresh) -> None:
    assert {backends.choose(op, GPU) for op in ELEMENTWISE} == {"triton"}
    assert backends.choose("tiled_linear", GPU) == "cuda"
    assert not backends._reported


@pytest.mark.parametrize("op", ELEMENTWISE)
def test_choose_when_triton_has_no_compiler_expect_cuda_reported_once(fresh, caplog, op: str) -> None:
    fresh.setattr(backends, "_without_compiler", lambda: "Triton needs a C compiler; install gcc or clang")
    with caplog.at_level(logging.WARNING, logger="mergequant"):
        assert [backends.choose(op, GPU) for _ in range(3)] == ["cuda"] * 3
    assert len(caplog.records) == 1
    assert backends.reports(op) == ["cuda runs, not triton: Triton needs a C compiler; install gcc or clang"]


def test_choose_when_only_torch_is_left_expect_every_lack_reported(fresh) -> None:
    fresh.setattr(backends, "_has_triton", lambda: False)
    fresh.setattr(compiler, "unavailable", lambda: "NVRTC is missing")
    assert backends.choose("rmsnorm_quant", GPU) == "torch"
    assert backends.reports("rmsnorm_quant") == [
        "torch runs, not triton: Triton is not installed",
        "torch runs, not cuda: NVRTC is missing",
    ]
    assert backends.choose("hadamard_quant", GPU) == "torch"
    assert backends.reports("hadamard_quant") == [
        "torch runs, not cuda: NVRTC is missing",
        "torch runs, not triton: Triton is not installed",
    ]


def test_choose_when_nvrtc_is_missing_expect_triton_reported(fresh) -> None:
    fresh.setattr(compiler, "unavailable", lambda: "NVRTC is missing")
    assert backends.choose("kv_attention", GPU) == "triton"
    assert backends.reports("kv_attention") == ["triton runs, not cuda: NVRTC is missing"]


def test_choose_when_the_architecture_is_the_reason_expect_no_report(fresh) -> None:
    fresh.setattr(backends, "_architecture", lambda device: "sm_80")
    assert backends.choose("tiled_linear", GPU) == "triton"
    assert not backends._reported


def test_explain_when_the_choice_was_reported_expect_the_reason_once(fresh) -> None:
    fresh.setattr(backends, "_without_compiler", lambda: "Triton needs a C compiler")
    module = import_module("mergequant.ops.explain")  # the function of this name hides the module
    fresh.setattr(module, "_architecture_at_hand", lambda: "sm_90")
    backends.choose("silu_mul", GPU)
    choice = next(choice for choice in ops.explain() if choice.op == "silu_mul")
    assert choice.backend == "cuda"
    assert choice.reason.count("Triton needs a C compiler") == 1


@pytest.mark.parametrize("name", ["gcc", "clang"])
def test_compiler_when_on_the_path_expect_no_reason(bare, monkeypatch, name: str) -> None:
    program(bare / name)
    (bare / "Python.h").touch()
    headers(monkeypatch, bare)
    assert shutil.which(name)
    assert backends._without_compiler() is None


def test_compiler_when_there_is_none_expect_what_to_install(bare) -> None:
    program(bare / "cc")  # Triton does not look for it
    reason = str(backends._without_compiler())
    assert "Triton needs a C compiler" in reason
    assert "install gcc or clang" in reason


def test_compiler_when_cc_names_no_program_expect_cc_named_even_beside_gcc(bare, monkeypatch) -> None:
    program(bare / "gcc")
    monkeypatch.setenv("CC", "icc")
    assert "CC='icc'" in str(backends._without_compiler())


def test_compiler_when_cc_names_a_program_expect_only_the_headers_wanted(bare, monkeypatch) -> None:
    program(bare / "mycc")
    monkeypatch.setenv("CC", str(bare / "mycc"))
    headers(monkeypatch, bare)
    assert "Python.h is missing" in str(backends._without_compiler())
    (bare / "Python.h").touch()
    backends._without_compiler.cache_clear()
    assert backends._without_compiler() is None


def test_op_when_cuda_is_forced_on_a_cpu_expect_an_error() -> None:
    with backends.use_backend("cuda"), pytest.raises(KernelError, match=r"static_quant.*on cpu"):
        ops.static_quant(torch.zeros(2, 8), torch.ones(1), None, None, 8)
