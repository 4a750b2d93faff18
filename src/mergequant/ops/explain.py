"""Which backend an op runs on, here or on a named GPU architecture, and why."""

from dataclasses import dataclass

import torch

from mergequant.ops.int_matmul import backend

__all__ = ["ARCHITECTURES", "Choice", "explain"]

ARCHITECTURES = ("cpu", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100")
INTEGER_OPS = ("int4_linear", "int8_linear")
FLOAT_OPS = ("rmsnorm_quant", "layernorm_quant", "static_quant", "dynamic_quant", "hadamard_transform")


@dataclass(frozen=True)
class Choice:
    """One op on one kind of machine: `backend` that runs, and `reason` for it."""

    op: str
    architecture: str
    backend: str
    reason: str


def explain(architecture: str | None = None) -> list[Choice]:
    """Backends of all ops on an architecture; None means the machine at hand.

    Raises:
        KernelError: an architecture that is not one of `ARCHITECTURES`.
    """
    from mergequant.errors import KernelError

    if architecture is None:
        architecture = _architecture_at_hand()
    elif architecture not in ARCHITECTURES:
        raise KernelError(f"unknown architecture {architecture!r}; known are {', '.join(ARCHITECTURES)}")
    if architecture == "cpu":
        product = backend(torch.device("cpu"))
        integer, reason = product, "exact int32 accumulation, tried on this processor's worst case"
        widened = "weights are widened to int8 once, at first use"
    else:
        integer, reason = "torch._int_mm", "int8 tensor cores through cuBLAS; this release has no kernel of its own yet"
        widened = "int4 weights are widened to int8 at every call"
    choices = [Choice(op, architecture, integer, reason) for op in INTEGER_OPS]
    choices[0] = Choice("int4_linear", architecture, integer, f"{reason}; {widened}")
    return choices + [
        Choice(op, architecture, "torch", "reference; no fused kernel in this release") for op in FLOAT_OPS
    ]


def _architecture_at_hand() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"
