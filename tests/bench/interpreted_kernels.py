"""Triton kernels of the baselines against their definition, on Triton's interpreter: run by test_kernels.py.

The interpreter is chosen when Triton is imported, hence a process of its own. All in float32: the interpreter does not
multiply bfloat16, and loses a carry when it makes float8. Prints one line per case: name and largest difference.
"""

import itertools
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from mergequant.bench import kernels, plain


def report(name: str, *pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    for number, (got, wanted) in enumerate(pairs):
        assert float(wanted.abs().max()) > 0.1, f"{name} {number}: the case is vacuous"
        print(f"{name} {number}: {float((got - wanted).abs().max()):.2e}")


def rows() -> None:
    for scaled, added in itertools.product((False, True), repeat=2):
        width = 48  # no power of two
        x, update = torch.randn(5, width), torch.randn(5, width)
        weight, gate_up = torch.rand(width) + 0.5, torch.randn(5, 2 * width)
        found = []
        for module in (kernels, plain):
            residual, out = x.clone(), torch.zeros(16, width)
            scales = [torch.zeros(16, 1) for _ in range(3)]
            module.add_norm(update if added else None, residual, weight, 1e-5, out, scales[0] if scaled else None)
            product, coded = torch.zeros(16, width), torch.zeros(16, width)
            module.silu_mul(gate_up, product, scales[1] if scaled else None)
            module.quantize_rows(x, coded, scales[2])
            found.append([residual, out, product, coded, scales[2], *(scales[:2] if scaled else ())])
        report(f"rows scaled={scaled} added={added}", *((a / b.abs().max(), b / b.abs().max()) for a, b in zip(*found)))


def heads() -> None:
    for (query_heads, kv_heads), norm in itertools.product(((4, 2), (4, 4), (8, 1)), (False, True)):
        batch, steps, width, capacity = 3, 4, 16, 70
        qkv = torch.randn(batch * steps, (query_heads + 2 * kv_heads) * width)
        cos, sin = torch.rand(capacity, width // 2), torch.rand(capacity, width // 2)
        lengths = torch.tensor([0, 3, 60], dtype=torch.int32)
        norms = (torch.rand(width) + 0.5, torch.rand(width) + 0.5) if norm else None
        found = []
        for module in (kernels, plain):
            keys, values = (torch.zeros(batch, kv_heads, capacity, width) for _ in range(2))
            queries = module.rope_append(qkv, cos, sin, lengths, norms, 1e-6, keys, values, query_heads)
            found.append((queries, keys, values))
        report(f"rope heads={query_heads}/{kv_heads} norm={norm}", *zip(*found))


def attention() -> None:
    for query_heads, kv_heads in ((4, 2), (8, 1)):
        cache = [torch.randn(2, kv_heads, 70, 16) for _ in range(2)]
        queries = torch.randn(2, query_heads, 16)
        for length in (1, 64, 70):
            both = [module.decode_attention(queries, *cache, length) for module in (kernels, plain)]
            report(f"attention heads={query_heads}/{kv_heads} length={length}", (both[0], both[1]))


if __name__ == "__main__":
    torch.manual_seed(0)
    kernels._multiprocessors = lambda device: 1  # a few splits, as on a GPU
    rows()
    heads()
    attention()
