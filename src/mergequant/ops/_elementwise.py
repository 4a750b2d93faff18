"""What the float ops share: the choice of their kernels, and packed codes."""

from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from mergequant.errors import KernelError
from mergequant.ops import backends

__all__ = ["MOST_GATHERED", "backend_for", "codes_like", "first_for_gather", "kernels_for", "pack_pairs"]

NARROW_DTYPES = (torch.bfloat16, torch.float16)
KERNEL_DTYPES = (*NARROW_DTYPES, torch.float32)
MOST_GATHERED = 8192  # channels, or codes, of a row whose constants a block of the CUDA norm keeps


def kernels_for(op: str, stem: str, *inputs: Tensor | None, first: str | None = None) -> Any:
    """Module with the kernels of an op for these float inputs; None: torch runs.

    Args:
        op: name of the op.
        stem: its module in `ops.triton`; the CUDA versions of all are in `ops.cuda.elementwise`, under the same names.
        inputs: the op's float tensors, None for what is not given. float64 stays with torch, which is reported.
        first: backend that is better here than the one that the op's order begins with.

    Raises:
        KernelError: the CUDA backend is forced on tensors of another device.
    """
    backend = backend_for(op, *inputs, first=first)
    return None if backend == "torch" else _module(backend, stem)


def backend_for(op: str, *inputs: Tensor | None, first: str | None = None) -> str:
    """Backend of an op for these float inputs; arguments and errors as for `kernels_for`."""
    given = [tensor for tensor in inputs if tensor is not None]
    device = given[0].device
    backend = backends.choose(op, device, first)
    if backend == "torch":
        return backend
    for tensor in given:
        if tensor.dtype not in KERNEL_DTYPES:
            name = {"cuda": "CUDA", "triton": "Triton"}[backend]
            backends.report_fallback(op, f"the {name} kernel takes {KERNEL_DTYPES}, not {tensor.dtype}: torch runs")
            return "torch"
    if backend == "cuda" and device.type != "cuda":
        raise KernelError(
            f"{op}: its CUDA kernel is asked for, but the input is on {device}; move it, or ask for torch"
        )
    return backend


@cache
def _module(backend: str, stem: str) -> Any:
    return import_module("mergequant.ops.cuda.elementwise" if backend == "cuda" else f"mergequant.ops.triton.{stem}")


def first_for_gather(x: Tensor, index: Tensor | None) -> str | None:
    """Backend to be preferred for the norm of x (..., channels) whose codes gather channels; None: no other than usual.

    On an NVIDIA H200 a block that takes many rows, and keeps what belongs to channels, is as fast as Triton's kernel
    for few rows and 1.6 times as fast for many (`benchmarks/elementwise_backends.py`).
    """
    if index is None or x.dtype not in NARROW_DTYPES or max(x.shape[-1], index.shape[0]) > MOST_GATHERED:
        return None
    return "cuda"


def pack_pairs(codes: Tensor) -> Tensor:
    """int8 codes (..., width) of at most 4 bits to uint8 (..., width / 2), even columns in the low nibbles.

    The layout of `grids.pack_codes` without its look at the values, which would stop a GPU and break a captured graph.
    """
    nibbles = codes.view(torch.uint8) & 0x0F
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def codes_like(x: Tensor, width: int, packed: bool = False) -> Tensor:
    """Uninitialised codes (..., width) for the tokens of x (..., any), or bytes (..., width / 2) if packed."""
    shape = (*x.shape[:-1], width // 2 if packed else width)
    return x.new_empty(shape, dtype=torch.uint8 if packed else torch.int8)
