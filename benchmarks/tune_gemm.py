"""Times every configuration of the integer GEMM kernels, beside torch's bf16 and fp8 products.

    python benchmarks/tune_gemm.py [--json OUT] [--models llama-2-7b,llama-3-8b] [--tokens 1,2,...] [--weight-bits 4]

Shapes are the fused linear layers of the models. Weights are random; up to 512 tokens they are cold: calls go round
copies that together exceed the L2 cache. Every figure is the median replay of a CUDA graph, in microseconds for one
call, once alone and once overlapped with the kernel ahead (`overlap`; torch's kernels do not overlap). Prefill plans
that the model of `prefill_plan` finds half as slow again as its best are left out above 512 tokens. Every result is
compared with the first configuration's: all must agree bit for bit.

The table has, by layer and tokens: bf16, fp8, the fastest configuration of each kernel alone | overlapped, what
`choose` takes with its time, and the ratios fp8 / ours and bf16 / ours of the chosen one, overlapped.
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

from mergequant.bench.timing import capture, times
from mergequant.ops.cuda import gemm, gemm_decode, gemm_prefill, launch
from mergequant.ops.cuda.compiler import Unit
from mergequant.ops.cuda.prefill_plan import seconds
from mergequant.ops.overlap import overlapping
from mergequant.ops.tiles import tile_shape

MODELS = {
    "llama-2-7b": {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)},
    "llama-3-8b": {"qkv": (6144, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)},  # o as above
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192)
LEAST_PREFILL = 64  # tokens from where the prefill kernel is timed
COLD_TOKENS = 512
COLD_BYTES = 110_000_000
PRUNE = 1.5
REPLAYS = 5
GRAPH_SECONDS = 2e-3  # of work in one graph, at least two calls
Call = Callable[[int], Tensor]  # of copy i of the weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--weight-bits", type=int, choices=(4, 8), default=4)
    arguments = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    tokens = [int(count) for count in arguments.tokens.split(",")]
    layers = [(model, name, *size) for model in arguments.models.split(",") for name, size in MODELS[model].items()]
    started = time.perf_counter()
    sms = launch.multiprocessors(device)
    problems = [(model, name, count, outputs, width) for model, name, outputs, width in layers for count in tokens]
    units = [
        used
        for _, _, count, outputs, width in problems
        for used in _units(count, outputs, width, arguments.weight_bits, sms)
    ]
    launch.prepare(dict.fromkeys(units), device)
    print(f"{len(set(units))} kernels ready after {time.perf_counter() - started:.1f} s", flush=True)
    rows = []
    for problem in problems:
        row = measure(*problem, arguments.weight_bits, sms, device)
        rows.append(row)
        print(line(row), flush=True)
        if arguments.json:
            found = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__, "rows": rows}
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"done after {time.perf_counter() - started:.1f} s")


def _plans(tokens: int, outputs: int, width: int, bits: int, sms: int) -> list[gemm_prefill.Plan]:
    if tokens < LEAST_PREFILL:
        return []
    plans = gemm_prefill.configurations(tokens, outputs, width, sms)
    if tokens <= COLD_TOKENS:
        return list(plans)
    modelled = {plan: seconds(plan, tokens, outputs, width, bits, sms) for plan in plans}
    return [plan for plan in plans if modelled[plan] < PRUNE * min(modelled.values())]


def _decoders(tokens: int, outputs: int, width: int) -> list[gemm_decode.Configuration]:
    return gemm_decode.configurations(tokens, outputs, width) if tokens <= gemm_decode.MOST_TOKENS else []


def _units(tokens: int, outputs: int, width: int, bits: int, sms: int) -> list[tuple[Unit, str]]:
    units = [
        (gemm_prefill.unit(plan, bits, 0), gemm_prefill.KERNEL) for plan in _plans(tokens, outputs, width, bits, sms)
    ]
    for known in _decoders(tokens, outputs, width):
        if isinstance(known, gemm_decode.Stream):
            units.append((gemm_decode.stream_unit(known, bits, 0, False), "gemm_stream"))
        else:
            units.append((gemm_decode.cluster_unit(known, bits, 0, False), "gemm_cluster"))
    return units


def measure(
    model: str, layer: str, tokens: int, outputs: int, width: int, bits: int, sms: int, device: torch.device
) -> dict[str, Any]:
    """All figures of one layer and number of tokens."""
    codes = torch.randint(-128, 128, (tokens, width), dtype=torch.int8, device=device)
    scale = torch.rand(outputs, device=device) * 1e-4
    shape = tile_shape(outputs, width, bits)
    count = _copies(outputs * width * bits // 8, tokens)
    tiles = [torch.randint(0, 256, shape, dtype=torch.uint8, device=device) for _ in range(count)]
    rest = (scale, None, None, bits, torch.bfloat16)
    calls: dict[tuple[str, str], Call] = {}
    expected: dict[str, float] = {}
    for plan in _plans(tokens, outputs, width, bits, sms):
        calls["prefill", str(plan)] = lambda i, plan=plan: gemm_prefill.linear(codes, tiles[i], *rest, plan=plan)
        expected[str(plan)] = seconds(plan, tokens, outputs, width, bits, sms) * 1e6
    for known in _decoders(tokens, outputs, width):
        kernel = type(known).__name__.lower()
        calls[kernel, str(known)] = lambda i, known=known: gemm_decode.linear(
            codes, tiles[i], *rest, configuration=known
        )
    calls["chosen", "choose"] = lambda i: gemm.linear(codes, tiles[i], *rest)
    first: Tensor | None = None
    candidates = []
    for (kernel, configuration), call in calls.items():
        result = call(0)
        first = result if first is None else first
        figures = {"kernel": kernel, "configuration": configuration, "exact": torch.equal(result, first)}
        figures["us"] = microseconds(call, count, device)
        with overlapping():
            figures["overlapped_us"] = microseconds(call, count, device)
        if configuration in expected:
            figures["model_us"] = round(expected[configuration], 2)
        candidates.append(figures)
    chosen = candidates.pop()
    taken = gemm_prefill.choose(tokens, outputs, width, sms, bits) if not gemm.decodes(tokens, outputs, sms) else None
    return {
        "model": model,
        "layer": layer,
        "tokens": tokens,
        "outputs": outputs,
        "width": width,
        "weight_bits": bits,
        "bf16_us": _bf16(tokens, outputs, width, device),
        "fp8_us": _fp8(tokens, outputs, width, device),
        "chosen": chosen | {"configuration": str(taken) if taken else "gemm_decode.choose"},
        "candidates": sorted(candidates, key=lambda figures: figures["overlapped_us"]),
    }


def _copies(weight_bytes: int, tokens: int) -> int:
    return max(1, -(-COLD_BYTES // weight_bytes)) if tokens <= COLD_TOKENS else 1


def _bf16(tokens: int, outputs: int, width: int, device: torch.device) -> float:
    x = torch.randn(tokens, width, dtype=torch.bfloat16, device=device)
    count = _copies(2 * outputs * width, tokens)
    weights = [torch.randn(outputs, width, dtype=torch.bfloat16, device=device) for _ in range(count)]
    return microseconds(lambda i: torch.mm(x, weights[i].t()), count, device)


def _fp8(tokens: int, outputs: int, width: int, device: torch.device) -> float:
    padded = -(-tokens // 16) * 16  # what the fp8 baseline of the bench does
    x = torch.randn(padded, width, device=device).to(torch.float8_e4m3fn)
    count = _copies(outputs * width, tokens)
    weights = [
        torch.randn(outputs, width, dtype=torch.bfloat16, device=device).to(torch.float8_e4m3fn) for _ in range(count)
    ]
    token_scale, weight_scale = torch.rand(padded, 1, device=device), torch.rand(1, outputs, device=device)

    def call(i: int) -> Tensor:
        return torch._scaled_mm(
            x,
            weights[i].t(),
            scale_a=token_scale,
            scale_b=weight_scale,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    return microseconds(call, count, device)


def microseconds(call: Call, copies: int, device: torch.device) -> float:
    """Median time of one call in a captured graph that goes round the copies."""
    call(0)
    torch.cuda.synchronize(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call(0)
    end.record()
    torch.cuda.synchronize(device)
    wanted = GRAPH_SECONDS * 1e3 / max(begin.elapsed_time(end), 1e-2)
    rounds = max(1, round(min(max(wanted, 2), 48) / copies))

    def run() -> None:
        for _ in range(rounds):
            for i in range(copies):
                call(i)

    replay = capture(run, device)
    replay()
    return round(statistics.median(times(replay, device, REPLAYS)) * 1e3 / (rounds * copies), 2)


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    chosen, tokens = row["chosen"], row["tokens"]
    best: dict[str, dict[str, Any]] = {}
    for figures in row["candidates"]:
        best.setdefault(figures["kernel"], figures)
    ours = chosen["overlapped_us"]
    rate = 2e-6 * tokens * row["outputs"] * row["width"] / ours
    kernels = "; ".join(
        f"{name} {found['us']:.1f}|{found['overlapped_us']:.1f} {found['configuration']}"
        for name, found in best.items()
    )
    wrong = sum(not figures["exact"] for figures in [*row["candidates"], chosen])
    return (
        f"{row['model']:10} {row['layer']:7} M={tokens:<5} bf16 {row['bf16_us']:7.1f} fp8 {row['fp8_us']:7.1f} "
        f"chosen {chosen['us']:7.1f}|{ours:7.1f} ({chosen['configuration']}) fp8/ours {row['fp8_us'] / ours:.2f} "
        f"bf16/ours {row['bf16_us'] / ours:.2f} {rate:5.0f} TOPS; {kernels}" + (f"  WRONG: {wrong}" if wrong else "")
    )


if __name__ == "__main__":
    main()
