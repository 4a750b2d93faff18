"""Which backend an op runs on, and why the others do not.

Each op has an order of preference. The first backend that is usable for the device at hand runs; `explain` tells the
reasons. A backend is never swapped during a run without a word: what an op cannot take on its preferred backend is
reported once through the logger `mergequant`, and kept for `explain`.
"""

import contextlib
import importlib.util
import logging
import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch

from mergequant.errors import KernelError, UsageError

__all__ = [
    "BACKENDS",
    "CUDA_ARCHITECTURES",
    "choose",
    "forced",
    "missing",
    "reason_against",
    "report_fallback",
    "reports",
    "use_backend",
]

LOG = logging.getLogger("mergequant")
VARIABLE = "MERGEQUANT_BACKEND"
NAMES = ("cuda", "triton", "torch")
ELEMENTWISE_OPS = (
    "rmsnorm_quant",
    "layernorm_quant",
    "add_rmsnorm_quant",
    "add_rmsnorm",
    "static_quant",
    "dynamic_quant",
    "silu_mul",
    "silu_mul_quant",
    "silu_mul_dynamic_quant",
)
ROTATING_OPS = ("hadamard_quant", "hadamard_dynamic_quant")
ROTATED_PRODUCTS = ("silu_mul_hadamard_quant", "silu_mul_hadamard_dynamic_quant")  # elsewhere two ops, one by one
TRITON_OPS = ("kv_read", "kv_page_read")
KERNEL_OPS = (
    "tiled_linear",
    "tiled_swiglu_quant",
    "kv_append",
    "kv_attention",
    "kv_page_attention",
    "codebook_linear",
    "sparse_dense_linear",
)
BACKENDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(KERNEL_OPS, ("cuda", "triton", "torch")),
    "int4x4_linear": ("cuda", "torch"),
    "kv_store": ("cuda", "torch"),
    **dict.fromkeys(ELEMENTWISE_OPS, ("triton", "cuda", "torch")),
    **dict.fromkeys(TRITON_OPS, ("triton", "torch")),
    **dict.fromkeys(ROTATING_OPS, ("cuda", "triton", "torch")),
    **dict.fromkeys(ROTATED_PRODUCTS, ("cuda", "torch")),
    "hadamard_transform": ("torch",),
    "codebook_weight": ("torch",),
    "kronecker_transform": ("torch",),
    "kronecker_dynamic_quant": ("torch",),
    "int4_linear": ("torch",),
    "int8_linear": ("torch",),
    "two_level_linear": ("torch",),
}
# Architectures that the CUDA sources of an op are written for. int4x4_linear also runs on sm_90, where its instruction
# is emulated: only a test asks for that. The elementwise sources want sm_80 and nothing newer; theirs are the
# architectures that NVRTC 13.0 compiles for.
CUDA_ARCHITECTURES = {
    **dict.fromkeys(KERNEL_OPS, ("sm_90",)),
    **dict.fromkeys(
        (*ELEMENTWISE_OPS, *ROTATING_OPS, *ROTATED_PRODUCTS, "kv_store"),
        ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_110", "sm_120", "sm_121"),
    ),
    "int4x4_linear": ("sm_80", "sm_86", "sm_89"),
}
LEAST_TRITON = 80

_forced: ContextVar[str | None] = ContextVar("mergequant_backend", default=None)
_reported: dict[tuple[str, str], None] = {}


def choose(op: str, device: torch.device, first: str | None = None) -> str:
    """Backend of an op on a device: "cuda", "triton" or "torch"; `first` goes before the op's own order.

    On a GPU that an earlier backend of the op's order is written for, what that backend lacks on this machine is
    reported, once.

    Raises:
        UsageError: `use_backend` or the variable MERGEQUANT_BACKEND asks for something that is no backend.
    """
    order = BACKENDS[op]
    asked = forced()
    if asked:
        if asked not in NAMES:
            raise UsageError(f"{VARIABLE} is {asked!r}; known backends are {', '.join(NAMES)}")
        return asked if asked in order else order[-1]
    if device.type != "cuda":
        return "torch"
    return _choose(op, _architecture(device), first)


@cache
def _choose(op: str, architecture: str, first: str | None) -> str:
    lacking: list[str] = []
    for name in sorted(BACKENDS[op], key=lambda name: name != first):
        if _unwritten(op, name, architecture) is not None:
            continue
        lack = missing(name)
        if lack is None:
            for reason in lacking:
                report_fallback(op, f"{name} runs, {reason}")
            return name
        lacking.append(f"not {name}: {lack}")
    raise KernelError(f"{op} has no backend on {architecture}; report this")


def reason_against(op: str, backend: str, architecture: str) -> str | None:
    """Why a backend of an op does not run on an architecture ("cpu", "sm_90", ...); None if it does."""
    return _unwritten(op, backend, architecture) or missing(backend)


def _unwritten(op: str, backend: str, architecture: str) -> str | None:
    """Why a backend of an op is not meant for an architecture."""
    if backend == "torch":
        return None
    if architecture == "cpu":
        return f"{backend} kernels run on NVIDIA GPUs"
    if backend == "triton":
        old = int(architecture.removeprefix("sm_")) < LEAST_TRITON
        return f"the Triton kernels want sm_{LEAST_TRITON} or newer" if old else None
    known = CUDA_ARCHITECTURES[op]
    return None if architecture in known else f"the CUDA kernel is written for {', '.join(known)}"


def missing(backend: str) -> str | None:
    """What a backend lacks on this machine; None if nothing."""
    if backend == "triton":
        return _without_compiler() if _has_triton() else "Triton is not installed"
    if backend == "cuda":
        from mergequant.ops.cuda import compiler

        return compiler.unavailable()
    return None


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run ops on one backend inside the `with`; ops that do not have it run on torch. Meant for tests and comparisons.

    Raises:
        KernelError: a name that is no backend.
    """
    if name not in NAMES:
        raise KernelError(f"unknown backend {name!r}; known are {', '.join(NAMES)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def forced() -> str | None:
    """The backend that `use_backend` or the variable MERGEQUANT_BACKEND asks for."""
    return _forced.get() or os.environ.get(VARIABLE) or None


def report_fallback(op: str, reason: str) -> None:
    """Say once that an op runs on a slower backend than it has, and why."""
    if (op, reason) not in _reported:
        _reported[op, reason] = None
        LOG.warning("%s: %s", op, reason)


def reports(op: str) -> list[str]:
    """What `report_fallback` was told about an op in this process."""
    return [reason for name, reason in _reported if name == op]


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _without_compiler() -> str | None:
    """Why Triton cannot build its launcher: a C extension, compiled at a kernel's first launch.

    Looks where Triton looks (its `runtime/build.py`): $CC if it is set, else gcc or clang, and Python's own headers.
    """
    needs = "Triton needs a C compiler and Python's headers to launch kernels"
    asked = os.environ.get("CC")
    if asked is not None:
        if shutil.which(asked) is None:
            return f"{needs}, and CC={asked!r} is no program; unset CC, or install gcc or clang"
    elif shutil.which("gcc") is None and shutil.which("clang") is None:
        return f"{needs}, and there is neither gcc nor clang; install gcc or clang"
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's own, which holds no headers
    header = Path(sysconfig.get_paths(scheme=scheme)["include"]) / "Python.h"
    return None if header.is_file() else f"{needs}, and {header} is missing; install Python's headers (python3-dev)"


@cache
def _architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
