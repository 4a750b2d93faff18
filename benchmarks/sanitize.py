"""Every CUDA kernel on awkward shapes, for NVIDIA's compute-sanitizer.

    compute-sanitizer --tool memcheck --report-api-errors no python benchmarks/sanitize.py
    compute-sanitizer --tool racecheck python benchmarks/sanitize.py

Results are not looked at here (tests/gpu does), memory is: tokens, channels and widths that fill no tile, divided
tiles, clusters, overlapped launches, ragged caches, a token beyond the capacity.
"""

import torch

from mergequant import ops
from mergequant.ops.backends import use_backend
from mergequant.ops.kv_append import kv_append
from mergequant.ops.kv_attention import kv_attention
from mergequant.ops.kv_pages import kv_page_attention, kv_store
from mergequant.ops.overlap import overlapping
from mergequant.ops.tiles import tile_weight

DEVICE = "cuda"
TOKENS = (1, 3, 17, 40, 130, 300)  # streaming, cluster and prefill kernels
OUTPUTS, WIDTH = 208, 400


def products() -> None:
    """4- and 8-bit weights, with and without token scales and bias, SwiGLU, both output dtypes."""
    for bits in (4, 8):
        limit = 1 << (bits - 1)
        tile = tile_weight(torch.randint(-limit, limit, (OUTPUTS, WIDTH), dtype=torch.int8, device=DEVICE), bits)
        scale, bias = torch.rand(OUTPUTS, device=DEVICE) / 1e4, torch.rand(OUTPUTS, device=DEVICE)
        for tokens in TOKENS:
            codes = torch.randint(-128, 128, (tokens, WIDTH), dtype=torch.int8, device=DEVICE)
            own = torch.rand(tokens, 1, device=DEVICE)
            with overlapping():
                ops.tiled_linear(codes, tile, scale, None, None, bits, torch.bfloat16)
                ops.tiled_linear(codes, tile, scale, own, bias, bits, torch.float16)
                ops.tiled_swiglu_quant(codes, tile, scale, None, None, bits, 8)


def caches() -> None:
    """A long append, steps one by one, and one beyond the capacity; attention over ragged rows."""
    rows, heads, key_heads, capacity = 3, 8, 2, 128
    for width in (64, 128):
        for bits in (4, 8):
            keys = torch.zeros(rows, key_heads, capacity, width * bits // 8, dtype=torch.uint8, device=DEVICE)
            values, scale = torch.zeros_like(keys), torch.full((key_heads, width), 0.05, device=DEVICE)
            angles = torch.rand(capacity, width // 2, device=DEVICE)
            lengths = torch.tensor([0, 5, 57], dtype=torch.int32, device=DEVICE)
            for tokens in (70, 1, 1):
                qkv = torch.randn(rows, tokens, (heads + 2 * key_heads) * width, device=DEVICE, dtype=torch.bfloat16)
                with overlapping():
                    q, _ = kv_append(qkv, angles.cos(), angles.sin(), lengths, keys, values, scale, scale, None, None,
                                     1e-5, heads, bits)  # fmt: skip
                    lengths += tokens
                    kv_attention(q[:, -1].contiguous(), keys, values, lengths.clamp(max=capacity), scale, scale, 0.1,
                                 bits, capacity, None, None, None, 0)  # fmt: skip


def pages() -> None:
    """Storing runs and scattered tokens, few and many, and attention over rows of pages; a stored first token."""
    heads, key_heads, page, most = 8, 2, 64, 12
    for width in (64, 128):
        for bits in (4, 8):
            cache = torch.zeros(2 * most, 2, key_heads, page, width * bits // 8, dtype=torch.uint8, device=DEVICE)
            scales = torch.full((2, key_heads, width), 0.05, device=DEVICE)
            first = torch.randn(2, key_heads, 1, width, device=DEVICE, dtype=torch.bfloat16)
            for tokens in (1, 7, 600):
                key, value = torch.randn(2, tokens, key_heads, width, device=DEVICE, dtype=torch.bfloat16)
                for slots in (torch.arange(5, 5 + tokens), torch.randperm(2 * most * page)[:tokens] - 3):
                    kv_store(key, value, slots.to(DEVICE), cache, *scales, bits, *first)
            table = torch.randperm(2 * most, device=DEVICE).view(2, most).int()
            q, out = torch.randn(2, 2, heads, width, device=DEVICE, dtype=torch.bfloat16)
            lengths = torch.tensor([0, most * page - 1], dtype=torch.int32, device=DEVICE)
            kv_page_attention(q, cache, table, lengths, *scales, 0.1, bits, most * page, out, *first)


def rows() -> None:
    """Norms, quantizers and gates, over widths that fill no vector, through the CUDA sources."""
    with use_backend("cuda"):
        for tokens, width in ((1, 100), (5, 1000), (130, 4096)):
            x = torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16)
            gain, step = torch.rand(width, device=DEVICE), torch.tensor([9.0], device=DEVICE)
            for bits in (4, 8):
                ops.rmsnorm_quant(x, gain, None, None, 1e-5, bits)
                ops.layernorm_quant(x, gain, None, gain, 1e-5, bits)
                ops.silu_mul_quant(torch.cat([x, x], 1), gain, None, None, bits)
                ops.static_quant(x, step, None, None, bits)
                ops.dynamic_quant(x, 0.9, bits)


if __name__ == "__main__":
    torch.manual_seed(0)
    for part in (products, caches, pages, rows):
        part()
    torch.cuda.synchronize()
    print("all kernels ran")
