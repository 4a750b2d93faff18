"""Which backend an op runs on, here or on a named GPU architecture, and why not on another."""

from dataclasses import dataclass

import torch

from mergequant.errors import KernelError
from mergequant.ops import backends
from mergequant.ops.int_matmul import backend as integer_product

__all__ = ["ARCHITECTURES", "Choice", "explain"]

ARCHITECTURES = ("cpu", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
WHAT = {
    "cuda": "the project's CUDA kernel, compiled at first use",
    "triton": "the project's Triton kernel",
    "torch": "plain torch, the reference",
}
INTEGER_OPS = ("int4_linear", "int8_linear", "two_level_linear")


@dataclass(frozen=True)
class Choice:
    """One op on one kind of machine: `backend` that runs, and `reason` for it and against the ones before it."""

    op: str
    architecture: str
    backend: str
    reason: str


def explain(architecture: str | None = None) -> list[Choice]:
    """Backends of all ops on an architecture; None means the machine at hand, with what this process reported.

    Raises:
        KernelError: an architecture that is not one of `ARCHITECTURES`.
    """
    here = architecture is None
    if architecture is None:
        architecture = _architecture_at_hand()
    elif architecture not in ARCHITECTURES:
        raise KernelError(f"unknown architecture {architecture!r}; known are {', '.join(ARCHITECTURES)}")
    return [_choice(op, architecture, here) for op in backends.BACKENDS]


def _choice(op: str, architecture: str, here: bool) -> Choice:
    if op in INTEGER_OPS:
        return Choice(op, architecture, *_integer(architecture))
    reasons: list[str] = []
    for name in backends.BACKENDS[op]:
        against = backends.reason_against(op, name, architecture)
        if against is None:
            reasons.insert(0, WHAT[name])
            if here:
                reported = backends.reports(op)
                reasons += [report for report in reported if not any(reason in report for reason in reasons)]
            return Choice(op, architecture, name, "; ".join(reasons))
        reasons.append(f"not {name}: {against}")
    raise KernelError(f"{op} has no backend on {architecture}; report this")


def _integer(architecture: str) -> tuple[str, str]:
    if architecture == "cpu":
        return integer_product(torch.device("cpu")), "exact int32 accumulation, tried on this processor's worst case"
    return "torch._int_mm", "row-major weights go through cuBLAS; `tiled_linear` has the project's own kernels"


def _architecture_at_hand() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"
