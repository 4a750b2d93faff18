"""Two CPU figures: what an integer linear layer costs against fake quantization, and where quantizing spends its time.

    python benchmarks/cpu.py linear [--threads 2] [--json OUT]
    python benchmarks/cpu.py quantize --model MODEL --calibration TEXT [--recipe mergequant] [--threads 2] [--json OUT]

`linear` times, interleaved, `int8_linear` on codes (int8 product, one multiply), fake quantization (the same layer
with decoded float32 weights and inputs), and bf16, and prints the median of the ratios. `quantize` prints seconds by
step and the peak resident memory of the process.
"""

import argparse
import json
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import mergequant
from mergequant import ops
from mergequant.grids import IntegerGrid, Quantizer

SHAPES = [(1, 512, 1408), (1, 4096, 4096), (16, 4096, 4096), (512, 512, 1408), (512, 4096, 4096), (2048, 1408, 512)]
ROUNDS = 15


def seconds(call: Callable[[], Any]) -> float:
    """One timed call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def linear() -> dict[str, Any]:
    """Median times and ratios by shape (tokens, width, outputs)."""
    rows = []
    for tokens, width, outputs in SHAPES:
        generator = torch.Generator().manual_seed(0)
        grid = IntegerGrid(4)
        weight = Quantizer(grid).encode(torch.randn(outputs, width, generator=generator))
        codes = grid.nearest(3 * torch.randn(tokens, width, generator=generator))
        narrow, scale = codes.to(torch.int8), weight.scale[:, 0].contiguous()
        decoded, step = weight.decode(), 0.25
        half, half_codes = decoded.to(torch.bfloat16), codes.to(torch.bfloat16)

        def integer() -> None:
            ops.int8_linear(narrow, weight.codes, scale, None, None, torch.float32)  # noqa: B023

        def fake() -> None:  # a static step per tensor: divide, round, clamp, multiply back, float GEMM
            torch.nn.functional.linear(grid.nearest(codes / step) * step, decoded)  # noqa: B023

        def bf16() -> None:
            torch.nn.functional.linear(half_codes, half)  # noqa: B023

        for call in (integer, fake, bf16):
            call()
        times = [[seconds(call) for call in (integer, fake, bf16)] for _ in range(ROUNDS)]
        medians = [statistics.median(column) for column in zip(*times)]
        rows.append(
            {
                "tokens": tokens,
                "width": width,
                "outputs": outputs,
                "integer_ms": round(medians[0] * 1e3, 3),
                "fake_ms": round(medians[1] * 1e3, 3),
                "bf16_ms": round(medians[2] * 1e3, 3),
                "fake_over_integer": round(statistics.median(row[1] / row[0] for row in times), 2),
                "bf16_over_integer": round(statistics.median(row[2] / row[0] for row in times), 2),
            }
        )
        print(rows[-1], flush=True)
    return {"rows": rows}


def quantize(model: str, calibration: str, recipe: str) -> dict[str, Any]:
    """Seconds by step, in all, and peak resident memory in MB, for 128 windows of 512 tokens."""
    with tempfile.TemporaryDirectory() as folder:
        done = mergequant.quantize(model, recipe, data=calibration, out=Path(folder) / "q", samples=128, seqlen=512)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    result = {
        "model": Path(model).name,
        "recipe": recipe,
        "seconds": done.figures["seconds"],
        "seconds_by_step": done.figures["seconds_by_step"],
        "peak_rss_mb": round(peak),
        "linear_bits_per_parameter": round(done.figures["linear_bits_per_parameter"], 3),
    }
    print(json.dumps(result, indent=1))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["linear", "quantize"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model")
    parser.add_argument("--calibration")
    parser.add_argument("--recipe", default="mergequant")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    if arguments.what == "quantize" and not (arguments.model and arguments.calibration):
        parser.error("quantize needs --model and --calibration")
    found = (
        linear() if arguments.what == "linear" else quantize(arguments.model, arguments.calibration, arguments.recipe)
    )
    found |= {"threads": arguments.threads, "torch": torch.__version__, "python": platform.python_version()}
    found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
