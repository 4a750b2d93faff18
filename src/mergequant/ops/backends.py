"""Which backend an op runs on, and why the others do not.

Each op has an order of preference. The first backend that is usable for the device at hand runs; `explain` tells the
reasons. A backend is never swapped during a run without a word: what an op cannot take on its preferred backend is
reported once through the logger `mergequant`, and kept for `explain`.
"""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache

import torch

from mergequant.errors import KernelError, UsageError

__all__ = ["BACKENDS", "CUDA_ARCHITECTURES", "choose", "reason_against", "report_fallback", "reports", "use_backend"]

LOG = logging.getLogger("mergequant")
VARIABLE = "MERGEQUANT_BACKEND"
NAMES = ("cuda", "triton", "torch")
FLOAT_OPS = (
    "rmsnorm_quant",
    "layernorm_quant",
    "add_rmsnorm_quant",
    "add_rmsnorm",
    "static_quant",
    "dynamic_quant",
    "silu_mul",
    "silu_mul_quant",
    "silu_mul_dynamic_quant",
    "hadamard_quant",
    "hadamard_dynamic_quant",
    "kv_read",
)
KERNEL_OPS = ("tiled_linear", "tiled_swiglu_quant", "kv_append", "kv_attention")
BACKENDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(KERNEL_OPS, ("cuda", "triton", "torch")),
    "int4x4_linear": ("cuda", "torch"),
    **dict.fromkeys(FLOAT_OPS, ("triton", "torch")),
    "hadamard_transform": ("torch",),
    "int4_linear": ("torch",),
    "int8_linear": ("torch",),
}
# Architectures that the CUDA sources of an op are written for. int4x4_linear also runs on sm_90, where its instruction
# is emulated: only a test asks for that.
CUDA_ARCHITECTURES = {
    **dict.fromkeys(KERNEL_OPS, ("sm_90",)),
    "int4x4_linear": ("sm_80", "sm_86", "sm_89"),
}
LEAST_TRITON = 80

_forced: ContextVar[str | None] = ContextVar("mergequant_backend", default=None)
_reported: dict[tuple[str, str], None] = {}


def choose(op: str, device: torch.device) -> str:
    """Backend of an op on a device: "cuda", "triton" or "torch".

    Raises:
        UsageError: `use_backend` or the variable MERGEQUANT_BACKEND asks for something that is no backend.
    """
    order = BACKENDS[op]
    forced = _forced.get() or os.environ.get(VARIABLE)
    if forced:
        if forced not in NAMES:
            raise UsageError(f"{VARIABLE} is {forced!r}; known backends are {', '.join(NAMES)}")
        return forced if forced in order else order[-1]
    if device.type != "cuda":
        return "torch"
    return _choose(op, _architecture(device))


@cache
def _choose(op: str, architecture: str) -> str:
    return next(name for name in BACKENDS[op] if reason_against(op, name, architecture) is None)


def reason_against(op: str, backend: str, architecture: str) -> str | None:
    """Why a backend of an op does not run on an architecture ("cpu", "sm_90", ...); None if it does."""
    if backend == "torch":
        return None
    if architecture == "cpu":
        return f"{backend} kernels run on NVIDIA GPUs"
    if backend == "triton":
        if int(architecture.removeprefix("sm_")) < LEAST_TRITON:
            return f"the Triton kernels want sm_{LEAST_TRITON} or newer"
        return None if _has_triton() else "Triton is not installed"
    known = CUDA_ARCHITECTURES[op]
    if architecture not in known:
        return f"the CUDA kernel is written for {', '.join(known)}"
    from mergequant.ops.cuda import compiler

    return compiler.unavailable()


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
def _architecture(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
