"""Speed of `sparse_dense_linear` and `codebook_linear` on one GPU: against bf16 cuBLAS, decoding first, and the memory.

    python benchmarks/weight_only.py [--share 0.005] [--variants] [--triton] [--out RESULTS.json]

Shapes are those of Llama-2-7B. `sparse`: codes of 4 bits in groups of 16 with quantized scales and zeros, in an order
of their own, with outliers (SpQR's layout); `v6k4096` and so on: vectors of 6 with 4096 entries in a codebook, `+256` a
residual book of 256. Every way is captured as a graph of many launches that goes over copies of the weight, more than
the cache holds; graphs take turns. Where `kernel` and `decode_then_multiply` cross is up to where the ops run a kernel.
Least time: the bytes of the weight at the rate at which several GB are only read, measured first, as in `mergequant
bench`. `weight_speed.py` makes the table of docs/results.md.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergequant import ops
from mergequant.bench.ceilings import measure_reading
from mergequant.bench.machine import describe_device, versions
from mergequant.grids import Outliers, SecondLevel
from mergequant.grids.codebook import packed_words, vectors_for
from mergequant.grids.second_level import encode_statistics
from mergequant.ops._weight_only import multiply_stored, places_of
from mergequant.ops.cuda import codebook_linear as cuda_codebook
from mergequant.ops.cuda import sparse_dense as cuda_sparse
from mergequant.ops.triton import codebook_linear as triton_codebook
from mergequant.ops.triton import sparse_dense as triton_sparse

SHAPES = {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)}
TOKENS = (1, 2, 4, 8, 16, 32)
CODEBOOKS = {"v6k4096": (6, 12, 0), "v4k256": (4, 8, 0), "v8k256+256": (8, 8, 8)}  # vector, bits, residual bits
GROUP, TILE, BITS = 16, 16, 4
CACHE = 150e6  # bytes that copies of a weight take together, at least: several times the cache
LAUNCHES, ROUNDS = 24, 7
TRITON_TOKENS = 4  # more are no use

Run = Callable[[], object]


@dataclass(frozen=True)
class Sparse:
    """A random weight as `sparse_dense_linear` takes it."""

    codes: Tensor
    scale: Tensor
    statistics: Tensor
    order: Tensor
    outliers: tuple[Tensor, Tensor, Tensor]  # pointers, columns, values

    @classmethod
    def drawn(cls, outputs: int, width: int, share: float, seed: int) -> "Sparse":
        generator = torch.Generator("cuda").manual_seed(seed)
        draw: dict[str, Any] = {"generator": generator, "device": "cuda"}
        codes = torch.randint(0, 256, (outputs, width // 2), dtype=torch.uint8, **draw)
        parts = []
        for middle in (0.01, -1.0):
            drawn = middle * (0.5 + torch.rand((outputs, width // GROUP), **draw))
            parts.append(encode_statistics(drawn, SecondLevel(TILE, 3)))
        statistics = torch.cat([parts[0][1], parts[1][1]], -1).contiguous()
        mask = torch.rand((outputs, width), **draw) < share
        store = Outliers.single(torch.full((outputs, width), 0.1, device="cuda"), mask)
        assert store.pointers is not None
        order = torch.randperm(width, **draw).to(torch.int16)
        return cls(
            codes,
            parts[0][0] | parts[1][0] << 4,
            statistics,
            order,
            (store.pointers, store.columns, store.values),
        )

    @property
    def dense(self) -> tuple[Tensor, Tensor, None, Tensor]:
        """Codes, scale, zero and statistics, as the op takes them."""
        return self.codes, self.scale, None, self.statistics

    @property
    def size(self) -> int:
        """Bytes that one product reads of it."""
        parts = (self.codes, self.scale, self.statistics, self.order, *self.outliers)
        return sum(part.numel() * part.itemsize for part in parts)

    def ways(self, x: Tensor, triton: bool) -> dict[str, Run]:
        """What is timed."""
        none = (None, None, None)
        found: dict[str, Run] = {
            "kernel": partial(cuda_sparse.linear, x, *self.dense, self.order, *self.outliers, None, TILE),
            "without_outliers": partial(cuda_sparse.linear, x, *self.dense, self.order, *none, None, TILE),
            "decode_then_multiply": partial(self.decoded, x),
        }
        if triton and x.shape[0] <= TRITON_TOKENS:
            found["triton"] = partial(triton_sparse.linear, x, *self.dense, self.order, *self.outliers, None, TILE)
        return found

    def variants(self, x: Tensor) -> dict[str, Run]:
        """The kernel with other configurations than the chosen one."""
        chosen = cuda_sparse.choose(*x.shape)
        assert chosen is not None
        shapes = ((4, 4), (4, 6), (8, 2), (8, 3), (16, 1))
        tried = [replace(chosen, warps=warps, blocks=blocks) for warps, blocks in shapes]
        return {
            f"warps {own.warps} blocks {own.blocks}": partial(
                cuda_sparse.linear, x, *self.dense, self.order, *self.outliers, None, TILE, configuration=own
            )
            for own in tried
            if own.fits(x.shape[1])
        }

    def decoded(self, x: Tensor) -> Tensor:
        """What the op does above `MOST_TOKENS` tokens."""
        parts = (*self.dense, places_of(self.order), *self.outliers)
        weight = triton_sparse.decode(*parts, BITS, TILE, x.shape[1], x.dtype)
        return multiply_stored(x, weight, self.order, None)

    def expected(self, x: Tensor) -> Tensor:
        """The reference, in float32."""
        weight = ops.decode_sparse(*self.dense, self.order, *self.outliers, BITS, TILE, x.shape[1])
        return x.float() @ weight.t()


@dataclass(frozen=True)
class Codebook:
    """A random weight as `codebook_linear` takes it: one part, in an order of its own."""

    words: Tensor
    book: Tensor
    layout: list[int]
    order: Tensor
    outputs: int

    @classmethod
    def drawn(cls, kind: str, outputs: int, width: int, seed: int) -> "Codebook":
        generator = torch.Generator("cuda").manual_seed(seed)
        vector, bits, residual = CODEBOOKS[kind]
        count = packed_words(vectors_for(outputs, vector) * width, bits + residual)
        draw: dict[str, Any] = {"generator": generator, "device": "cuda"}
        words = torch.randint(-(1 << 31), 1 << 31, (count,), dtype=torch.int64, **draw).to(torch.int32)
        entries = (1 << bits) + (1 << residual if residual else 0)
        book = (torch.randn(1, entries, vector, **draw) * 0.02).half()
        order = torch.randperm(width, **draw).to(torch.int16)
        return cls(words, book, [width, bits, residual], order, outputs)

    @property
    def size(self) -> int:
        return sum(part.numel() * part.itemsize for part in (self.words, self.book, self.order))

    def ways(self, x: Tensor, triton: bool) -> dict[str, Run]:
        stored = ([self.words], [self.book], self.layout, self.order)
        found: dict[str, Run] = {
            "kernel": partial(cuda_codebook.linear, x, *stored, None, self.outputs),
            "decode_then_multiply": partial(self.decoded, x),
        }
        if triton and x.shape[0] <= TRITON_TOKENS:
            found["triton"] = partial(triton_codebook.codebook_linear, x, *stored, [], None, self.outputs)
        return found

    def variants(self, x: Tensor) -> dict[str, Run]:
        stored = ([self.words], [self.book], self.layout, self.order)
        return {
            f"cluster {size}": partial(cuda_codebook.linear, x, *stored, None, self.outputs, cluster=size)
            for size in (1, 2, 3, 4, 5, 6, 8)
        }

    def decoded(self, x: Tensor) -> Tensor:
        weight = triton_codebook.decode([self.words], [self.book], self.layout, self.outputs, x.dtype)
        return multiply_stored(x, weight, self.order, None)

    def expected(self, x: Tensor) -> Tensor:
        weight = ops.codebook_weight([self.words], [self.book], self.layout, self.order, [], self.outputs)
        return x.float() @ weight.t()


def captured(runs: Sequence[Run]) -> tuple[torch.cuda.CUDAGraph, int]:
    """The runs one after the other, over and over, as one graph; and how many there are."""
    for run in runs:
        run()
    torch.cuda.synchronize()
    times = -(-LAUNCHES // len(runs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            for run in runs:
                run()
    return graph, times * len(runs)


def microseconds(ways: dict[str, list[Run]]) -> dict[str, float]:
    """Median time of one run of every way; ways take turns."""
    graphs = {way: captured(runs) for way, runs in ways.items()}
    times: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(ROUNDS + 1):
        for way, (graph, count) in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if number:  # the first round warms up
                times[way].append(start.elapsed_time(end) * 1000 / count)
    return {way: sorted(own)[len(own) // 2] for way, own in times.items()}


def measured(
    name: str, outputs: int, width: int, share: float, read: float, variants: bool, triton: bool
) -> list[dict[str, Any]]:
    """Rows of all weights of a shape; `read`: TB/s, for what is shown."""
    rows = []
    few = max(2, -(-int(CACHE) // (outputs * width * 2)))
    floats = [torch.randn(outputs, width, device="cuda", dtype=torch.bfloat16) for _ in range(few)]
    for op in ("sparse", *CODEBOOKS):

        def drawn(seed: int, op: str = op) -> Sparse | Codebook:
            if op == "sparse":
                return Sparse.drawn(outputs, width, share, seed)
            return Codebook.drawn(op, outputs, width, seed)

        copies = [drawn(0)]
        while len(copies) * copies[0].size < CACHE:
            copies.append(drawn(len(copies)))
        for tokens in TOKENS:
            x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
            ways = {way: [copy.ways(x, triton)[way] for copy in copies] for way in copies[0].ways(x, triton)}
            ways["bf16"] = [partial(torch.nn.functional.linear, x, part) for part in floats]
            expected = copies[0].expected(x)
            row: dict[str, Any] = {"op": op, "shape": name, "tokens": tokens}
            for way in ("kernel", "decode_then_multiply"):
                found = ways[way][0]()
                assert isinstance(found, Tensor)
                row[f"error_{way}"] = float((found.float() - expected).norm() / expected.norm())
            row |= microseconds(ways)
            row["bytes"] = copies[0].size
            if variants and tokens in (1, 8):
                tried = {way: [copy.variants(x)[way] for copy in copies] for way in copies[0].variants(x)}
                row["variants"] = microseconds(tried)
            rows.append(row)
            show(row, read)
        del copies
    return rows


def show(row: dict[str, Any], read: float) -> None:
    """One line of the table."""
    least = row["bytes"] / read / 1e6
    figures = {way: row.get(way) for way in ("kernel", "without_outliers", "decode_then_multiply", "triton", "bf16")}
    shown = " ".join(f"{way} {time:7.1f}" for way, time in figures.items() if time is not None)
    more = f" outliers +{row['kernel'] / row['without_outliers'] - 1:.0%}" if "without_outliers" in row else ""
    print(
        f"{row['op']:>11} {row['shape']:>8} {row['tokens']:>3} | {shown} least {least:6.1f} | "
        f"{row['bf16'] / row['kernel']:.2f}x bf16, {least / row['kernel']:.0%} of the ceiling{more}, "
        f"error {row['error_kernel']:.1e} {row['error_decode_then_multiply']:.1e}",
        flush=True,
    )
    for way, time in row.get("variants", {}).items():
        print(f"{'':>26}{way}: {time:.1f}")


def main() -> None:
    """Print and store a row for each weight, shape and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=0.005, help="of the weights that are outliers")
    parser.add_argument("--variants", action="store_true", help="also time other configurations of the kernels")
    parser.add_argument("--triton", action="store_true", help="also time the Triton kernels")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    read = measure_reading(device)[0]
    print(f"{torch.cuda.get_device_name()}: reads {read:.2f} TB/s; times in microseconds")
    rows: list[dict[str, Any]] = []
    for name, (outputs, width) in SHAPES.items():
        rows += measured(name, outputs, width, arguments.share, read, arguments.variants, arguments.triton)
    for op in ("sparse", *CODEBOOKS):
        slower = [row["tokens"] for row in rows if row["op"] == op and row["kernel"] > row["decode_then_multiply"]]
        print(f"{op}: the kernel is the faster one at all shapes below {min(slower, default='any number of')} tokens")
    if arguments.out is not None:
        command = " ".join(["python", "benchmarks/weight_only.py", *sys.argv[1:]])
        found = {"device": describe_device(device), "versions": versions(device), "command": command}
        stored = {**found, "read_tb_s": round(read, 3), "rows": rows}
        arguments.out.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main()
