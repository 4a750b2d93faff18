"""Norms, quantizers and rotations: the CUDA sources against Triton's kernels, in turns.

    python benchmarks/elementwise_backends.py [--json OUT]

bfloat16 rows of Llama-2-7B's widths to int8 codes. Every figure is the median over passes of a captured graph of calls
that overlap as in a decode step, in microseconds for one call; `gb_s` counts what must be read and written. Rotations
with SwiGLU are also run with other numbers of blocks on a multiprocessor than the usual one.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from mergequant import ops
from mergequant.bench.machine import describe_device, versions
from mergequant.bench.timing import capture, interleaved, ratio
from mergequant.ops.backends import use_backend
from mergequant.ops.overlap import overlapping

CHANNELS, FFN = 4096, 11008
GATHERED = 4416  # codes of 4096 channels, as split channels and padding make them
TOKENS = (1, 16, 128, 2048, 16384)
CALLS, PASSES = 32, 3
BACKENDS = ("triton", "cuda")


def cases(tokens: int) -> dict[str, tuple[Callable[[], object], int]]:
    """A call of each op, and the bytes that it moves at least."""
    device = torch.device("cuda")
    x = torch.randn(tokens, CHANNELS, device=device, dtype=torch.bfloat16)
    residual, wide = torch.randn_like(x), torch.randn(tokens, FFN, device=device, dtype=torch.bfloat16)
    gain, step = torch.rand(CHANNELS, device=device) * 30, torch.full((1,), 20.0, device=device)
    row, ffn, taken = tokens * CHANNELS, tokens * FFN, tokens * GATHERED
    pairs = torch.randn(tokens, 2 * FFN, device=device, dtype=torch.bfloat16)
    extra = torch.randint(0, CHANNELS, (GATHERED - CHANNELS,), device=device, dtype=torch.int32)
    index = torch.sort(torch.cat((torch.arange(CHANNELS, device=device, dtype=torch.int32), extra)))[0]
    gains = gain[index.long()]
    return {
        "rmsnorm_quant": (lambda: ops.rmsnorm_quant(x, gain, None, None, 1e-5, 8), 3 * row),
        "add_rmsnorm_quant": (lambda: ops.add_rmsnorm_quant(x, residual, gain, None, None, 1e-5, 8), 7 * row),
        "add_rmsnorm_quant, gathered": (
            lambda: ops.add_rmsnorm_quant(x, residual, gains, index, None, 1e-5, 8),
            6 * row + taken,
        ),
        "static_quant": (lambda: ops.static_quant(wide, step, None, None, 8), 3 * ffn),
        "dynamic_quant": (lambda: ops.dynamic_quant(wide, 0.9, 8), 3 * ffn),
        "hadamard_quant of 4096": (lambda: ops.hadamard_quant(x, step, None, None, 8), 3 * row),
        "hadamard_quant": (lambda: ops.hadamard_quant(wide, step, None, None, 8), 3 * ffn),
        "hadamard_dynamic_quant": (lambda: ops.hadamard_dynamic_quant(wide, 0.9, 8), 3 * ffn),
        "silu_mul, hadamard_quant": (lambda: ops.silu_mul_hadamard_quant(pairs, step, None, None, 8), 5 * ffn),
    }


def repeated(call: Callable[[], object]) -> None:
    """`CALLS` calls that overlap."""
    with overlapping():
        for _ in range(CALLS):
            call()


def shapes_of_rotation(tokens: int) -> dict[str, Callable[[], object]]:
    """A call of the CUDA rotation with SwiGLU for each width and number of blocks."""
    from mergequant.ops.cuda import rotate

    step = torch.full((1,), 20.0, device="cuda")
    calls: dict[str, Callable[[], object]] = {}
    for width, counts in ((CHANNELS, (4, 6)), (FFN, (1, 2))):
        pairs = torch.randn(tokens, 2 * width, device="cuda", dtype=torch.bfloat16)
        for blocks in counts:
            calls[f"{width} x {blocks}"] = partial(rotate.silu_mul_hadamard_quant, pairs, step, None, 8, blocks=blocks)
    return calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    rows = []
    for tokens in TOKENS:
        for name, (call, size) in cases(tokens).items():
            replays = {}
            for backend in BACKENDS:

                def many(call: Callable[[], object] = call, backend: str = backend) -> None:
                    with use_backend(backend):
                        repeated(call)

                replays[backend] = capture(many, device)
            found = interleaved(replays, device, PASSES)
            for backend in BACKENDS:
                microseconds = 1e3 * found[backend].ms / CALLS
                rows.append(
                    {
                        "op": name,
                        "tokens": tokens,
                        "backend": backend,
                        "us": round(microseconds, 3),
                        "gb_s": round(size / microseconds / 1e3, 1),
                        "vs_triton": round(ratio(found["triton"], found[backend]), 3),
                    }
                )
            line = ", ".join(f"{row['backend']} {row['us']:.2f} us" for row in rows[-len(BACKENDS) :])
            print(f"{name:28s} {tokens:5d} tokens: {line}, cuda {rows[-1]['vs_triton']:.2f}x", flush=True)
    for tokens in TOKENS[-2:]:
        replays = {name: capture(partial(repeated, call), device) for name, call in shapes_of_rotation(tokens).items()}
        found = interleaved(replays, device, PASSES)
        told = ", ".join(f"{name} blocks {1e3 * times.ms / CALLS:.1f} us" for name, times in found.items())
        print(f"silu_mul, hadamard_quant     {tokens:5d} tokens: {told}", flush=True)
    ratios = [row["vs_triton"] for row in rows if row["backend"] == "cuda"]
    print(f"median {statistics.median(ratios):.2f}x, {min(ratios):.2f}x to {max(ratios):.2f}x")
    if arguments.json:
        command = " ".join(["python", "benchmarks/elementwise_backends.py", *sys.argv[1:]])
        document = {"device": describe_device(device), "versions": versions(device), "command": command, "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
