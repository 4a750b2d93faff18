"""Times every division of the decode attention kernels, beside torch's cuDNN attention in bfloat16.

    python benchmarks/tune_kv.py [--json OUT] [--batch 1,4,16,64] [--context 512,2048,8192] [--bits 4,8,16]

32 query heads of 128 channels, with 32 key heads (mha) and with 8 (gqa). Caches hold random codes and go round copies
that together exceed the L2 cache. Every figure is the median replay of a CUDA graph, in microseconds for one call,
with overlapped launches that read ahead, as in a captured decode step (cuDNN's do not overlap). Every result is
compared with the first one of its kind.

The table has, by batch, context and heads: cuDNN, the float cache in Triton, and for each width of codes the fastest
division (warps x splits / resident warps) with its TB/s of cache bytes, and what `choose` takes with its time.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mergequant.bench.timing import capture, times
from mergequant.ops.cuda import kv, launch
from mergequant.ops.overlap import overlapping
from mergequant.ops.triton import kv_attention as in_triton

HEADS, WIDTH = 32, 128
KINDS = {"mha": 32, "gqa": 8}  # key heads
COLD_BYTES = 200_000_000  # several times the L2 cache
MOST_COPIES = 24
GRAPH_SECONDS = 1.5e-3  # of work in one graph
ASSUMED_RATE = 4e12  # bytes a second, for planning
REPLAYS = 5
TOLERANCE = 1e-2  # two roundings to bfloat16, of products too
Call = Callable[[int], Tensor]  # of copy i of the cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batch", default="1,4,16,64")
    parser.add_argument("--context", default="512,2048,8192")
    parser.add_argument("--bits", default="4,8,16")
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    bits = [int(value) for value in arguments.bits.split(",")]
    units = [
        (
            kv.attention_unit(WIDTH, HEADS // heads, width, torch.bfloat16, False, each.warps, each.resident),
            kv.ATTENTION,
        )
        for heads in KINDS.values()
        for width in bits
        if width < 16
        for each in kv.configurations(WIDTH, HEADS // heads, width, False)
    ]
    started = time.perf_counter()
    launch.prepare(units, device)
    rows = []
    for kind in KINDS:
        for batch in map(int, arguments.batch.split(",")):
            for context in map(int, arguments.context.split(",")):
                row = {"kind": kind, "batch": batch, "context": context}
                row |= {str(width): measure(kind, batch, context, width, device) for width in bits}
                rows.append(row)
                print(line(row), flush=True)
    report = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "seconds": round(time.perf_counter() - started, 1),
        "rows": rows,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({"seconds": report["seconds"], "rows": len(rows)}))


class Figures:
    """Microseconds of calls that must all give the first one's result, by name."""

    def __init__(self, what: str, copies: int, nbytes: int, device: torch.device) -> None:
        self.what, self.copies, self.nbytes, self.device = what, copies, nbytes, device
        self.found: dict[str, Any] = {}
        self._reference: Tensor | None = None

    def add(self, name: str, call: Call) -> None:
        out = call(0).float()
        if self._reference is None:
            self._reference = out
        error = float((out - self._reference).norm() / self._reference.norm())
        if not error < TOLERANCE:
            raise SystemExit(f"{self.what}: {name} is off by {error:.1e}")
        self.found[name] = clock(call, self.copies, self.nbytes, self.device)


def measure(kind: str, batch: int, context: int, bits: int, device: torch.device) -> dict[str, Any]:
    """All figures of one size and one width of codes."""
    heads = KINDS[kind]
    group, pairs = HEADS // heads, batch * heads
    q = torch.randn(batch, HEADS, WIDTH, device=device, dtype=torch.bfloat16)
    lengths = torch.full((batch,), context, device=device, dtype=torch.int32)
    scale = torch.full((heads, WIDTH), 0.2 if bits == 4 else 0.01, device=device)
    nbytes = 2 * pairs * context * WIDTH * bits // 8
    copies = max(1, min(MOST_COPIES, -(-COLD_BYTES // nbytes)))
    caches = [cache_of(batch, heads, context, bits, device) for _ in range(copies)]
    figures = Figures(f"{kind}, batch {batch}, context {context}, {bits} bits", copies, nbytes, device)
    if bits == 16:
        figures.add("cudnn", lambda i: cudnn(q, *caches[i], group > 1))
        chosen = in_triton.choose_splits(pairs, context, in_triton.BLOCK_FLOAT, device)
        for splits in sorted({max(1, chosen // 2), chosen, min(in_triton.MOST_SPLITS, chosen * 2)}):
            figures.add(f"triton {splits}", lambda i, s=splits: triton(q, caches[i], lengths, scale, context, s))
        return figures.found | {"chosen": f"triton {chosen}", "bytes": nbytes}
    for each in kv.configurations(WIDTH, group, bits, False):
        if each.warps * each.splits > 4 * max(1, context // kv.chunk_slots(WIDTH, bits)):
            continue  # nearly all warps would idle
        figures.add(name_of(each), lambda i, d=each: attend(q, caches[i], lengths, scale, bits, context, d))
    best = kv.choose(pairs, context, WIDTH, bits, launch.multiprocessors(device))
    return figures.found | {"chosen": name_of(best), "bytes": nbytes}


def name_of(division: kv.Division) -> str:
    return f"{division.warps}x{division.splits}/{division.resident}"


def cache_of(batch: int, key_heads: int, context: int, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random keys and values."""
    shape = (batch, key_heads, context, WIDTH if bits == 16 else WIDTH * bits // 8)
    if bits == 16:
        return torch.randn(shape, device=device, dtype=torch.bfloat16), torch.randn(
            shape, device=device, dtype=torch.bfloat16
        )
    return tuple(torch.randint(0, 256, shape, device=device, dtype=torch.uint8) for _ in range(2))  # type: ignore[return-value]


def attend(
    q: Tensor, cache: tuple[Tensor, Tensor], lengths: Tensor, scale: Tensor, bits: int, most: int, division: kv.Division
) -> Tensor:
    out = torch.empty((q.shape[0], HEADS * WIDTH), device=q.device, dtype=q.dtype)
    nothing = (None, None, None, 0)  # no prefix, float result
    kv.attend(q, *cache, lengths, scale, scale, WIDTH**-0.5, bits, most, *nothing, True, out, division)
    return out


def triton(q: Tensor, cache: tuple[Tensor, Tensor], lengths: Tensor, scale: Tensor, most: int, splits: int) -> Tensor:
    out = torch.empty((q.shape[0], HEADS * WIDTH), device=q.device, dtype=q.dtype)
    nothing = (None, None, None, 0)
    in_triton.attend(q, *cache, lengths, scale, scale, WIDTH**-0.5, 16, most, *nothing, out, splits)
    return out


def cudnn(q: Tensor, keys: Tensor, values: Tensor, grouped: bool) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=grouped)
    return out.flatten(1)


def clock(call: Call, copies: int, nbytes: int, device: torch.device) -> float:
    """Microseconds of one call."""
    calls = max(copies, 2, min(40, int(GRAPH_SECONDS * ASSUMED_RATE / nbytes)))

    def work() -> None:
        for i in range(calls):
            call(i % copies)

    with overlapping():
        replay = capture(work, device)
    replay()
    return round(statistics.median(times(replay, device, REPLAYS)) * 1e3 / calls, 2)


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    text = f"{row['kind']} {row['batch']:3d} x {row['context']:5d}"
    for bits, results in row.items():
        if not isinstance(results, dict):
            continue
        own = {name: value for name, value in results.items() if isinstance(value, float)}
        if bits == "16":
            text += " | " + ", ".join(f"{name} {value}" for name, value in own.items())
            continue
        name = min(own, key=lambda each: own[each])
        rate = results["bytes"] / own[name] / 1e6
        chosen = results["chosen"]
        text += f" | {bits} bits {name} {own[name]} us {rate:.2f} TB/s, chosen {chosen} {own.get(chosen)}"
    return text


if __name__ == "__main__":
    main()
