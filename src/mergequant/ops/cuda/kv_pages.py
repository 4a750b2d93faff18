"""Host side of the kernels on caches in pages: storing. Attention over pages is `kv.attend` with a table."""

import torch
from torch import Tensor

from mergequant.ops.cuda.compiler import Unit
from mergequant.ops.cuda.launch import kernel

__all__ = ["store", "store_unit"]

STORE = "kv_store"  # the kernel, and the stem of its source
FEW_TOKENS, MANY_TOKENS = 4, 32  # of a block
MANY = 512  # tokens from which on blocks of MANY_TOKENS fill the chip
ALIGNED = 8  # floats of 16 bits: what a thread loads at once


def store_unit(width: int, bits: int, dtype: torch.dtype, stored: bool, tokens: int) -> Unit:
    """The store kernel for heads of `width` channels and blocks of `tokens`; `stored`: there is a stored token."""
    return Unit(
        f"{STORE}.cu",
        (
            ("MQ_HEAD", width),
            ("MQ_BITS", bits),
            ("MQ_TOKENS", tokens),
            ("MQ_FLOAT16", int(dtype == torch.float16)),
            ("MQ_STORED", int(stored)),
        ),
    )


def store(
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    pages: Tensor,
    key_scale: Tensor,
    value_scale: Tensor,
    bits: int,
    prefix_key: Tensor | None,
    prefix_value: Tensor | None,
) -> None:
    """`kv_store`; arguments as the op's, checked by it."""
    tokens, key_heads, width = key.shape
    own = FEW_TOKENS if tokens < MANY else MANY_TOKENS
    unit = store_unit(width, bits, key.dtype, prefix_key is not None, own)
    kernel(unit, STORE, key.device).launch(
        (key_heads, -(-tokens // own), 1),
        256 if own == MANY_TOKENS else 128,
        (
            key,
            value,
            slots,
            pages,
            key_scale,
            value_scale,
            prefix_key,
            prefix_value,
            tokens,
            key.stride(0),
            value.stride(0),
            pages.shape[3],
        ),
    )
