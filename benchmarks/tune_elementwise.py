"""Times of the elementwise kernels on a GPU, captured in CUDA graphs, and what a static step saves over a dynamic one.

    python benchmarks/tune_elementwise.py [--json OUT] [--sweep]

Each row is an op at some number of tokens and a width: microseconds, and TB/s of the bytes that it must read and write.
Up to 16 tokens kernels overlap as in a decode step. Three ways to quantize behind a norm stand side by side: the static
step, folded into the norm's gain; a step per token in the same kernel as the norm (a kernel of this file: the package
has no use for it); and the norm, then `dynamic_quant`. `--sweep` times other cuts of the online rotation as well.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mergequant import ops
from mergequant.ops.triton import hadamard_quant as hadamard
from mergequant.ops.triton.common import (
    FEW_ROWS,
    block_for,
    code_constants,
    launch,
    quotient,
    round_to_code,
    store_codes,
    wait_for_predecessor,
    warps_for,
)

TOKENS = (1, 16, 2048, 8192)
CHANNELS = 4096
FFN = (11008, 14336)
ROTATED = (4096, 11008, 14336, 28672)
OVERLAPPED_TOKENS = 16
CACHE_BYTES = 120e6  # inputs rotate over more than twice the last-level cache
REPEATS = 9
EPS = 1e-5
BF16, CODE = 2, 1  # bytes


@triton.jit
def _norm_dynamic(  # type: ignore[no-untyped-def]
    x, gain, out, scales, eps, share,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, PACKED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """RMSNorm and a step per token in one kernel, for comparison."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    weight = tl.load(gain + columns, mask=inside, other=0.0)
    wait_for_predecessor(OVERLAP)
    value = tl.load(x + row * WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.rsqrt(tl.sum(value * value, 0) / WIDTH + eps) * weight
    step = tl.maximum(tl.max(tl.abs(value), 0) * share, 1e-12)
    tl.store(scales + row, step)
    codes = round_to_code(quotient(value, step, tl.div_rn(1.0, step)), LOW, HIGH)
    store_codes(out + row * WIDTH, 0, codes, WIDTH, BLOCK, PACKED)


def norm_dynamic(x: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of RMSNorm(x) * gain in one kernel."""
    rows, width = x.shape
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scales = torch.empty((rows, 1), device=x.device)
    block = block_for(width)
    constants = {"WIDTH": width, "BLOCK": block, **code_constants(8)}
    launch(_norm_dynamic, (rows,), (x, gain, out, scales, EPS, 1 / 127), x.device, warps_for(block, rows), **constants)
    return out, scales


def microseconds(calls: Sequence[Callable[[], Any]], overlap: bool) -> float:
    """Median time of one call; all are captured in one graph."""
    with ops.overlapping(overlap):
        for call in calls[:2]:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
    times = []
    for repeat in range(REPEATS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if repeat > 1:
            times.append(start.elapsed_time(end))
    return 1e3 * statistics.median(times) / len(calls)


def measure(name: str, tokens: int, width: int, in_width: int, bytes_each: float, call: Callable[[Tensor], Any]) -> Any:
    """One row: `call` on inputs (tokens, in_width) that move `bytes_each` bytes per token."""
    size = BF16 * tokens * in_width
    buffers = [
        torch.randn(tokens, in_width, device="cuda", dtype=torch.bfloat16)
        for _ in range(max(1, min(8, round(CACHE_BYTES / size))))
    ]
    count = 40 if tokens <= OVERLAPPED_TOKENS else max(8, len(buffers))
    calls = [partial(call, buffers[i % len(buffers)]) for i in range(count)]
    time = microseconds(calls, overlap=tokens <= OVERLAPPED_TOKENS)
    row = {"op": name, "tokens": tokens, "width": width, "us": round(time, 2)}
    row["tb_s"] = round(bytes_each * tokens / time / 1e6, 3)
    print(f"{name:32s} {tokens:6d} x {width:6d} {row['us']:9.2f} us {row['tb_s']:7.3f} TB/s", flush=True)
    return row


def norms() -> list[Any]:
    """The ops at the model's width."""
    gain = torch.rand(CHANNELS, device="cuda") * 30
    weight = gain.bfloat16()
    rows = []
    for tokens in TOKENS:
        other = torch.randn(tokens, CHANNELS, device="cuda", dtype=torch.bfloat16)

        def unfused(x: Tensor) -> Any:
            return ops.dynamic_quant(ops.add_rmsnorm(None, x, weight, EPS), 1.0, 8)

        cases: list[tuple[str, float, Callable[[Tensor], Any]]] = [
            ("norm, static", BF16 + CODE, lambda x: ops.rmsnorm_quant(x, gain, None, None, EPS, 8)),
            ("norm, static, packed", BF16 + 0.5, lambda x: ops.rmsnorm_quant(x, gain, None, None, EPS, 4, packed=True)),
            ("norm, dynamic, one kernel", BF16 + CODE, lambda x: norm_dynamic(x, gain)),
            ("norm, dynamic, two kernels", 3 * BF16 + CODE, unfused),
            ("norm", 2 * BF16, lambda x: ops.add_rmsnorm(None, x, weight, EPS)),
            (
                "add, norm, static",
                3 * BF16 + CODE,
                lambda x: ops.add_rmsnorm_quant(other, x, gain, None, None, EPS, 8),  # noqa: B023
            ),
            ("static_quant", BF16 + CODE, lambda x: ops.static_quant(x, gain, None, None, 8)),
            ("dynamic_quant", BF16 + CODE, lambda x: ops.dynamic_quant(x, 1.0, 8)),
        ]
        rows += [measure(name, tokens, CHANNELS, CHANNELS, CHANNELS * each, call) for name, each, call in cases]
    return rows


def gates() -> list[Any]:
    """SwiGLU at the widths of MLPs."""
    rows = []
    cases: list[tuple[str, float, Callable[[Tensor], Any]]] = [
        ("silu_mul", 3 * BF16, ops.silu_mul),
        ("silu_mul, static", 2 * BF16 + CODE, lambda x: ops.silu_mul_quant(x, None, None, None, 8)),
        ("silu_mul, dynamic", 2 * BF16 + CODE, lambda x: ops.silu_mul_dynamic_quant(x, 1.0, 8)),
    ]
    for width in FFN:
        for tokens in TOKENS:
            rows += [measure(name, tokens, width, 2 * width, width * each, call) for name, each, call in cases]
    return rows


def rotations() -> list[Any]:
    """The online rotation against quantizing alone."""
    step = torch.full((1,), 20.0, device="cuda")
    rows = []
    cases: list[tuple[str, Callable[[Tensor], Any]]] = [
        ("static_quant", lambda x: ops.static_quant(x, step, None, None, 8)),
        ("hadamard, static", lambda x: ops.hadamard_quant(x, step, None, None, 8)),
        ("hadamard, dynamic", lambda x: ops.hadamard_dynamic_quant(x, 1.0, 8)),
    ]
    for width in ROTATED:
        for tokens in (1, 2048):
            rows += [measure(name, tokens, width, width, width * (BF16 + CODE), call) for name, call in cases]
    return rows


def sweep() -> list[Any]:
    """Other cuts of the rotation at 2048 tokens, through `hadamard.plan`."""
    rows = []
    original = hadamard.plan
    for width in (11008, 14336, 28672):
        for dynamic in (False, True):
            base = original(width, FEW_ROWS, dynamic, 132)
            variants = {
                base,
                dataclasses.replace(base, stages=1),
                dataclasses.replace(base, programs=base.programs // 2),
                dataclasses.replace(base, programs=base.programs // 2, stages=1),
                dataclasses.replace(base, warps=12 - base.warps),
                dataclasses.replace(base, slice=base.slice // 2, warps=4, stages=1),
            }
            for cut in sorted(variants, key=str):
                hadamard.plan = lambda *_, cut=cut: cut  # type: ignore[assignment]
                label = f"slice {cut.slice} warps {cut.warps} stages {cut.stages} programs {cut.programs}"
                try:
                    call = ops.hadamard_dynamic_quant if dynamic else ops.hadamard_quant
                    step = torch.full((1,), 20.0, device="cuda")
                    rest = (1.0, 8) if dynamic else (step, None, None, 8)
                    name = f"{'dyn' if dynamic else 'stat'} {label}"
                    rows.append(measure(name, 2048, width, width, width * 3, lambda x: call(x, *rest)))  # noqa: B023
                except triton.runtime.errors.OutOfResources as error:
                    print(f"{label}: {error}", flush=True)
    hadamard.plan = original
    return rows


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--sweep", action="store_true", help="try other cuts of the rotation as well")
    options = parser.parse_args()
    torch.manual_seed(0)
    result = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
        "rows": norms() + gates() + rotations(),
        "sweep": sweep() if options.sweep else [],
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
