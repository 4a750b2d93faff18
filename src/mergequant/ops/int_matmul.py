"""Exact product of two int8 matrices with int32 accumulation, by the means that this machine has.

torch's own int8 product is used on CPU and CUDA. Processors without VNNI instructions add pairs of 8-bit products in
16 bits, which saturates for large codes, so its exactness is tried once on the worst case instead of believed; where it
fails, a float64 product (exact for these sizes) takes its place, and `backend` says so.
"""

from functools import cache

import torch
from torch import Tensor

__all__ = ["backend", "int_matmul"]

CUDA_LEAST_ROWS = 32  # torch._int_mm on CUDA wants more than 16 rows ...
CUDA_MULTIPLE = 8  # ... and widths that are multiples of 8
CPU_BROKEN_WIDTH = 1  # torch._int_mm on CPU leaves its result uninitialised for a single column (torch 2.13)


@cache
def _cpu_product_is_exact() -> bool:
    codes = torch.full((4, 64), 127, dtype=torch.int8)
    weight = torch.full((8, 64), -128, dtype=torch.int8)
    codes[1::2] = -128
    expected = (codes.double() @ weight.double().t()).to(torch.int32)
    return torch.equal(torch._int_mm(codes, weight.t()), expected)


def backend(device: torch.device) -> str:
    """Name of what multiplies integers on a device."""
    if device.type == "cpu":
        return "torch._int_mm" if _cpu_product_is_exact() else "float64 (this CPU's int8 product saturates)"
    return "torch._int_mm" if device.type == "cuda" else "float64"


def int_matmul(codes: Tensor, weight: Tensor) -> Tensor:
    """codes (rows, width) int8 times weight (outputs, width) int8, transposed: int32 (rows, outputs), exact."""
    device = codes.device
    if device.type == "cuda":
        return _cuda_int_matmul(codes, weight)
    if device.type == "cpu" and codes.shape[1] > CPU_BROKEN_WIDTH and _cpu_product_is_exact():
        return torch._int_mm(codes, weight.t())
    return (codes.double() @ weight.double().t()).to(torch.int32)


def _cuda_int_matmul(codes: Tensor, weight: Tensor) -> Tensor:
    rows, width = codes.shape
    outputs = weight.shape[0]
    pad_rows = max(CUDA_LEAST_ROWS - rows, 0)
    pad_width, pad_outputs = -width % CUDA_MULTIPLE, -outputs % CUDA_MULTIPLE
    if pad_rows or pad_width:
        codes = torch.nn.functional.pad(codes, (0, pad_width, 0, pad_rows))
    if pad_width or pad_outputs:
        weight = torch.nn.functional.pad(weight, (0, pad_width, 0, pad_outputs))
    return torch._int_mm(codes, weight.t())[:rows, :outputs]
