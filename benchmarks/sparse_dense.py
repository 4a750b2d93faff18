"""Speed of `sparse_dense_linear` on one GPU: against bf16 cuBLAS, without its outliers, and by tokens.

    python benchmarks/sparse_dense.py [--share 0.005] [--out RESULTS.json]

Shapes are those of Llama-2-7B; codes of 4 bits in groups of 16 with quantized scales and zeros (SpQR's layout). For
each number of tokens both ways run, the kernel and "decode, then multiply": where they cross is what `MOST_TOKENS`
should be.
All runs take turns on weights that do not fit the cache.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from mergequant import ops
from mergequant.grids import Outliers, SecondLevel, pack_stream
from mergequant.grids.second_level import encode_statistics
from mergequant.ops.triton import sparse_dense

SHAPES = {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)}
TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 32)
# As the op takes them: codes, scale, zero, statistics, order, pointers, columns and values of outliers.
Parts = tuple[Tensor, Tensor, None, Tensor, Tensor, Tensor, Tensor, Tensor]
GROUP, TILE, BITS, COPIES, ROUNDS = 16, 16, 4, 4, 50


def weight(outputs: int, width: int, share: float, seed: int) -> Parts:
    """Random parts of a weight, as the op takes them: codes, scale, zero, statistics, order, outliers."""
    generator = torch.Generator("cuda").manual_seed(seed)
    codes = torch.randint(0, 16, (outputs, width), generator=generator, device="cuda", dtype=torch.int32)
    shape = (outputs, width // GROUP)
    parts = []
    for middle in (0.01, -1.0):
        drawn = middle * (0.5 + torch.rand(shape, generator=generator, device="cuda"))
        parts.append(encode_statistics(drawn, SecondLevel(TILE, 3)))
    scale = parts[0][0] | parts[1][0] << 4
    statistics = torch.cat([parts[0][1], parts[1][1]], -1).contiguous()
    order = torch.randperm(width, generator=generator, device="cuda").to(torch.int16)
    mask = torch.rand((outputs, width), generator=generator, device="cuda") < share
    store = Outliers.single(torch.full((outputs, width), 0.1, device="cuda"), mask)
    pointers = torch.empty(0) if store.pointers is None else store.pointers
    return pack_stream(codes, BITS), scale, None, statistics, order, pointers, store.columns, store.values


def milliseconds(runs: list[Callable[[], object]]) -> float:
    """Median time of a run, over rounds that go through all copies."""
    for run in runs:
        run()
    times = []
    for number in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        runs[number % len(runs)]()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The run as a CUDA graph, so that Python's own time does not count."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def times(x: Tensor, copies: list[Parts], floats: list[Tensor]) -> dict[str, float]:
    """Milliseconds of every way for one number of tokens."""
    width = x.shape[1]
    ways: dict[str, list[Callable[[], object]]] = {
        "kernel": [captured(partial(sparse_dense.linear, x, *parts, None, TILE)) for parts in copies],
        "without_outliers": [
            captured(partial(sparse_dense.linear, x, *parts[:5], None, None, None, None, TILE)) for parts in copies
        ],
        "decode_then_multiply": [partial(decode_and_multiply, x, parts, width) for parts in copies],
        "bf16": [captured(partial(torch.nn.functional.linear, x, part)) for part in floats],
    }
    return {way: milliseconds(runs) for way, runs in ways.items()}


def decode_and_multiply(x: Tensor, parts: Parts, width: int) -> Tensor:
    """What the op does above `MOST_TOKENS` tokens."""
    return torch.nn.functional.linear(x, ops.decode_sparse(*parts, BITS, TILE, width).to(x.dtype))


def main() -> None:
    """Print and store a row for each shape and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.005)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for name, (outputs, width) in SHAPES.items():
        copies = [weight(outputs, width, arguments.share, seed) for seed in range(COPIES)]
        floats = [torch.randn(outputs, width, device="cuda", dtype=torch.bfloat16) for _ in range(COPIES)]
        for tokens in TOKENS:
            x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
            row = {"shape": name, "tokens": tokens, **times(x, copies, floats)}
            rows.append(row)
            print(json.dumps(row), flush=True)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
