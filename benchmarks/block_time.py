"""How long weight-only recipes take for one block of a large model, and so for the model.

    python benchmarks/block_time.py [--only RECIPE ...] [--shape llama-2-7b] [--seconds 200] [--device cuda] --out JSON

A model of one block with random weights is quantized by `mergequant.quantize`, from 128 windows of 2048 tokens, whose
embeddings are correlated: a falling spectrum and a few strong channels. A row's time runs from the first calibration
token to the written block: the block's inputs, their Hessians, the solver, packing, steps of a quantized cache, the
quantized block's outputs, and the float block on held-out windows beside it. What is done once for a model (reading,
proofs, verifying) counts only in `total_seconds`. Without --only, recipes with a goal run, then GPTQ on a block of the
70B model, then quick ones, until --seconds are over; rows of other runs stay in the file. `weights.times` makes the
table of docs/results.md.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accuracy import write
from generate import llama
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

import mergequant
from mergequant.bench.machine import describe_device, versions
from mergequant.bench.shapes import named_shape
from mergequant.calibration import StorePolicy
from mergequant.comparison.memory import peak_memory
from mergequant.pipeline import Silent
from mergequant.runtime import DecoderShape

SMALL, LARGE = "llama-2-7b", "llama-2-70b-layer"
FIRST = ("gptq", "quantease", "spqr", "vptq")
OTHERS = ("hqq", "powerquant", "gwq", "adadim", "cmpq")  # what learns or searches by rows takes longer: --only
# The larger block by one recipe: what it takes there tells how times grow.
ORDER = (*((SMALL, name) for name in FIRST), (LARGE, FIRST[0]), *((SMALL, name) for name in OTHERS))
SAMPLES, SEQLEN = 128, 2048
STRONG, STRONG_CHANNELS = 20.0, 4  # how much larger, how many
WARM_UP = DecoderShape(
    layers=1, channels=256, heads=4, kv_heads=4, head_width=64, ffn=704, vocabulary=512, positions=64, rope_theta=1e4
)


class Timer(Silent):
    """A reporter that notes when calibration begins and when the last block is done."""

    started = done = 0.0

    def phase(self, text: str) -> None:
        """What is read and drawn before counts for no block."""
        if text.startswith(("preparing", "looking for the prefix")):
            self.started = time.perf_counter()

    def block(self, index: int, total: int, name: str, figures: Mapping[str, float]) -> None:
        """What was started on a GPU is waited for."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.done = time.perf_counter()


def model_of(shape: DecoderShape, device: torch.device) -> PreTrainedModel:
    """One block with random weights behind correlated embeddings, twice as many as channels so that they span all."""
    torch.manual_seed(0)
    with device:
        model = LlamaForCausalLM(llama(replace(shape, vocabulary=2 * shape.channels), 1)).eval()
        model.get_input_embeddings().weight.data = correlated(2 * shape.channels, shape.channels)
    return model.to(torch.bfloat16).cpu()


def correlated(tokens: int, width: int) -> Tensor:
    """(tokens, width) of unit size: a spectrum that falls as 1/sqrt(i), in a random basis, then strong channels."""
    basis = torch.linalg.qr(torch.randn(width, width))[0]
    x = torch.randn(tokens, width) / torch.arange(1, width + 1).sqrt() @ basis.t()
    x = x / x.square().mean().sqrt()
    x[:, :: width // STRONG_CHANNELS] *= STRONG
    return x


def measure(
    model: PreTrainedModel, recipe: str, samples: int, seqlen: int, device: torch.device, policy: StorePolicy
) -> dict[str, Any]:
    """Seconds of one block, and what else the run took."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, model.config.vocab_size, (2 * samples + 8, seqlen), generator=generator)
    timer, before = Timer(), time.perf_counter()
    with peak_memory(device) as peak:
        made = mergequant.quantize(
            model,
            recipe,
            data=tokens,
            samples=samples,
            seqlen=seqlen,
            device=device,
            bos=False,
            reporter=timer,
            policy=policy,
        )
    return {
        "recipe": recipe,
        "seconds": timer.done - timer.started,
        "total_seconds": time.perf_counter() - before,
        "seconds_by_step": made.figures["seconds_by_step"],
        "linear_bits_per_parameter": made.figures["linear_bits_per_parameter"],
        "peak_memory_bytes": peak.bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--only", action="append", help="recipes to run")
    parser.add_argument("--shape", choices=(SMALL, LARGE), default=SMALL, help="what --only runs on")
    parser.add_argument("--seconds", type=float, default=200, help="start no further recipe after so many")
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    device: torch.device = arguments.device
    on_device = torch.cuda.mem_get_info(device)[0] // 3 if device.type == "cuda" else 0
    policy = StorePolicy(device, device_bytes=on_device)
    known = json.loads(arguments.out.read_text()) if arguments.out.exists() else {"rows": []}
    known["command"] = " ".join(["python", "benchmarks/block_time.py", *sys.argv[1:]])
    known["device"], known["versions"] = describe_device(device), versions(device)
    known["protocol"] = f"{SAMPLES} windows of {SEQLEN} tokens, defaults of every recipe"
    measure(model_of(WARM_UP, device), "gptq", 4, 64, device, policy)  # libraries are loaded and their handles made
    runs = [(arguments.shape, name) for name in arguments.only] if arguments.only else list(ORDER)
    models: dict[str, PreTrainedModel] = {}
    end = time.monotonic() + arguments.seconds
    for shape, recipe in runs:
        if time.monotonic() > end:
            print(f"left out for want of time: {recipe} on {shape}", file=sys.stderr, flush=True)
            continue
        if shape not in models:
            models[shape] = model_of(named_shape(shape, 1), device)
        row = {"shape": shape, **measure(models[shape], recipe, SAMPLES, SEQLEN, device, policy)}
        print(f"{shape:20} {recipe:12} {row['seconds']:7.1f} s, {row['total_seconds']:7.1f} s in all", flush=True)
        print(f"    {row['seconds_by_step']}", flush=True)
        known["rows"] = [old for old in known["rows"] if (old["shape"], old["recipe"]) != (shape, recipe)]
        known["rows"].append(row)
        write(arguments.out, known)


if __name__ == "__main__":
    main()
