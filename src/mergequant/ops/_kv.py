"""What the cache ops share: checks of caches and lengths, and the backend that takes a call."""

import torch
from torch import Tensor

from mergequant.ops import backends
from mergequant.ops._validate import require, require_float
from mergequant.ops.kv_layout import CAPACITY_MULTIPLE, cache_width

__all__ = ["CACHE_BITS", "MOST_GROUPED", "pick", "require_caches", "require_lengths", "unserved"]

CACHE_BITS = (4, 8, 16)
MOST_GROUPED = 8  # query heads of one key head
CUDA_WIDTHS = (64, 128)
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
LEAST_DOT_WIDTH, LEAST_CODES_WIDTH = 16, 64  # of the Triton kernels: sides of matrix products, whole steps of channels


def require_caches(
    op: str,
    key_cache: Tensor,
    value_cache: Tensor,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    bits: int,
    head_width: int | None = None,
    like: Tensor | None = None,
) -> int:
    """Check both caches and their scales; return the head width.

    Args:
        op: name for messages.
        key_cache, value_cache: (batch, heads, capacity, D) floats at 16 bits, else uint8 (..., D * bits / 8).
        key_scale, value_scale: float32 (heads, D); not looked at with 16 bits.
        bits: 4, 8 or 16.
        head_width: D, where the caller knows it.
        like: activations, whose device (and dtype, of float caches) and batch the caches must share.

    Raises:
        KernelError: something is not as above.
    """
    require(bits in CACHE_BITS, lambda: f"{op}: bits is {bits}; caches have {CACHE_BITS} bits")
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        require(cache.dim() == 4, lambda: f"{op}: {name} {tuple(cache.shape)} is not (batch, heads, capacity, width)")
        require(cache.is_contiguous(), lambda: f"{op}: {name} is not contiguous; kernels address it as one block")
        require(cache.shape == key_cache.shape, lambda: f"{op}: {name} {tuple(cache.shape)} differs from key_cache")
        if like is not None:
            require(
                cache.device == like.device, lambda: f"{op}: {name} is on {cache.device}, the input on {like.device}"
            )
            require(
                cache.shape[0] == like.shape[0],
                lambda: f"{op}: {name} has {cache.shape[0]} rows, the input {like.shape[0]}",
            )
    stored = key_cache.shape[-1]
    width = head_width or (stored if bits == 16 else stored * 8 // bits)
    if bits == 16:
        for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
            require_float(op, name, cache)
            require(stored == width, lambda: f"{op}: {name} has rows of {stored}, heads are {width} wide")
            if like is not None:
                require(
                    cache.dtype == like.dtype,
                    lambda: f"{op}: {name} is {cache.dtype}, the input {like.dtype}; use one dtype",
                )
        return width
    wanted = cache_width(width, bits)
    heads, capacity = key_cache.shape[1:3]
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        require(
            cache.dtype == torch.uint8 and stored == wanted,
            lambda: f"{op}: {name} is {cache.dtype} with rows of {stored}; pass uint8 rows of {wanted} ({bits} bits)",
        )
    require(
        capacity > 0 and capacity % CAPACITY_MULTIPLE == 0,
        lambda: f"{op}: capacity {capacity} is no multiple of {CAPACITY_MULTIPLE}; round it up",
    )
    for name, scale in (("key_scale", key_scale), ("value_scale", value_scale)):
        require(scale is not None, lambda: f"{op}: {name} is missing; quantized caches need it")
        assert scale is not None  # for the type checker
        require(
            scale.shape == (heads, width) and scale.dtype == torch.float32 and scale.device == key_cache.device,
            lambda: (
                f"{op}: {name} is {scale.dtype} {tuple(scale.shape)} on {scale.device}; "
                f"pass float32 ({heads}, {width}) on {key_cache.device}"
            ),
        )
    return width


def require_lengths(op: str, lengths: Tensor, rows: int, device: torch.device, most: int) -> None:
    """`lengths` is int32 (rows,); on a CPU its values must lie in 0..most (on a GPU reading them would stall it)."""
    require(
        lengths.shape == (rows,) and lengths.dtype == torch.int32 and lengths.device == device,
        lambda: (
            f"{op}: lengths is {lengths.dtype} {tuple(lengths.shape)} on {lengths.device}; "
            f"pass int32 ({rows},) on {device}"
        ),
    )
    if device.type == "cpu" and rows:
        low, high = int(lengths.min()), int(lengths.max())
        require(
            low >= 0 and high <= most, lambda: f"{op}: lengths are {low}..{high}, outside 0..{most}; enlarge the cache"
        )


def unserved(head_width: int, group: int, dtype: torch.dtype, bits: int) -> dict[str, str | None]:
    """Why the CUDA and the Triton kernels do not take such heads; None where they do."""
    least = LEAST_DOT_WIDTH if bits == 16 else LEAST_CODES_WIDTH
    power_of_two = head_width >= least and head_width & (head_width - 1) == 0
    return {
        "cuda": None
        if head_width in CUDA_WIDTHS and group <= MOST_GROUPED and dtype in KERNEL_DTYPES
        else f"the CUDA kernel takes {CUDA_WIDTHS} channels per head, up to {MOST_GROUPED} queries per key head, "
        f"bfloat16 or float16; not {head_width}, {group}, {dtype}",
        "triton": None
        if power_of_two and dtype in (*KERNEL_DTYPES, torch.float32)
        else f"the Triton kernel takes a power of two of channels per head (from {least}) and no {torch.float64}; "
        f"not {head_width}, {dtype}",
    }


def pick(op: str, device: torch.device, reasons: dict[str, str | None]) -> str:
    """Backend of a call: the op's choice for the device, or the next that can take the call.

    `reasons` says why a backend does not take it, and is reported once. An empty reason is for calls that another
    backend is meant to take.
    """
    backend = backends.choose(op, device)
    order = backends.BACKENDS[op]
    while (reason := reasons.get(backend)) is not None:
        backend = order[order.index(backend) + 1]
        if backend == "triton":
            reasons["triton"] = reasons.get("triton") or backends.missing("triton")
        if reason:
            backends.report_fallback(op, f"{reason}; running on {backend}")
    return backend
