"""CPU figures: integer linear layers and decoding against fake quantization and bf16, and where quantizing spends time.

    python benchmarks/cpu.py linear [--threads 2] [--json OUT]
    python benchmarks/cpu.py decode --model MODEL --calibration TEXT [--threads 2] [--json OUT]
    python benchmarks/cpu.py quantize --model MODEL --calibration TEXT [--recipe mergequant] [--threads 2] [--json OUT]

`linear` times one layer on codes (`QuantLinear`, bf16 out), fake quantization (the same layer with decoded weights and
rounded inputs, in float32 and in bf16) and a bf16 layer. `decode` does the same at few tokens, for layers of small and
large models, and then decodes greedily with whole models. All take turns in short bursts, and the least time of each
counts: what else runs on the machine can only add to it. `quantize` prints seconds by step and the peak resident memory
of the process.
"""

import argparse
import copy
import json
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import mergequant
from mergequant import ops
from mergequant.grids import IntegerGrid, Quantizer, pack_codes
from mergequant.nn import InputSpec, LinearSpec, NormSpec, QuantLinear, QuantNorm

# Tokens, width, outputs.
SHAPES = [
    (1, 512, 1408),
    (1, 4096, 4096),
    (16, 4096, 4096),
    (512, 512, 512),
    (512, 512, 1408),
    (512, 4096, 4096),
    (2048, 1408, 512),
]
DECODE_LAYERS = [(512, 512), (512, 1408), (1408, 512), (2048, 2048), (4096, 4096), (4096, 11008)]
DECODE_TOKENS = (1, 8)
COLD = 16_000_000  # elements of all copies of a layer: more than caches of a core hold
BURST = 1e-3  # seconds; shorter than what an operating system gives a process at a time
PATIENCE = 3.0  # seconds that one comparison takes
RECIPES = ("rtn", "mergequant", "mergequant-plus", "mergequant-w4a8")
# A larger model of the same family with random weights, on which speed does not depend: half a TinyLlama.
WIDE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 11, "num_attention_heads": 32}
WIDE |= {"num_key_value_heads": 4, "head_dim": 64}
PROMPT, NEW_TOKENS, ROUNDS = 32, 16, 25
Calls = dict[str, Callable[[], Any]]


def least_ms(calls: Calls, copies: int) -> dict[str, float]:
    """Least time of one call of each, in turns of short bursts.

    Each keeps walking through its copies, so that between two uses of a copy all others have been read; calls of the
    others in between only add to that.
    """
    burst = {}
    for name, call in calls.items():
        started = time.perf_counter()
        for _ in range(copies):
            call()
        burst[name] = max(1, int(BURST * copies / (time.perf_counter() - started)))
    best = dict.fromkeys(calls, float("inf"))
    ends = time.perf_counter() + PATIENCE
    while time.perf_counter() < ends:
        for name, call in calls.items():
            started = time.perf_counter()
            for _ in range(burst[name]):
                call()
            best[name] = min(best[name], (time.perf_counter() - started) / burst[name])
    return {name: value * 1e3 for name, value in best.items()}


def layer(tokens: int, width: int, outputs: int) -> dict[str, Any]:
    """Times of one layer. Every call takes another copy of the weights, as the layers of a model do."""
    generator = torch.Generator().manual_seed(0)
    grid, step = IntegerGrid(4), 0.25
    weight = Quantizer(grid).encode(torch.randn(outputs, width, generator=generator))
    codes = grid.nearest(3 * torch.randn(tokens, width, generator=generator))
    module = QuantLinear(LinearSpec(outputs, InputSpec("codes", width, width, 4), 4)).to(torch.bfloat16)
    module.weight_codes.copy_(pack_codes(weight.codes, 4))
    module.weight_scale.copy_(weight.scale[:, 0] * step)
    narrow, wide, half = codes.to(torch.int8), codes * step, (codes * step).to(torch.bfloat16)
    decoded = weight.decode()
    copies = max(2, COLD // weight.codes.numel())
    modules = cycle([copy.deepcopy(module) for _ in range(copies)])
    floats = cycle([decoded.clone() for _ in range(copies)])
    halves = cycle([decoded.to(torch.bfloat16) for _ in range(copies)])
    for _ in range(copies):
        next(modules)(narrow)  # prepares the weights

    def fake(x: Tensor, matrix: Tensor) -> Tensor:  # a static step per tensor: divide, round, clamp, multiply back
        return torch.nn.functional.linear(grid.nearest(x / step) * step, matrix)

    found = least_ms(
        {
            "integer": lambda: next(modules)(narrow),
            "fake": lambda: fake(wide, next(floats)),
            "fake_bf16": lambda: fake(half, next(halves)),
            "bf16": lambda: torch.nn.functional.linear(half, next(halves)),
        },
        copies,
    )
    row: dict[str, Any] = {"tokens": tokens, "width": width, "outputs": outputs}
    row |= {f"{name}_ms": round(value, 4) for name, value in found.items()}
    row |= {f"{name}_over_integer": round(found[name] / found["integer"], 2) for name in ("fake", "fake_bf16", "bf16")}
    print(row, flush=True)
    return row


def linear() -> dict[str, Any]:
    """One layer at few and at many tokens."""
    return {"rows": [layer(*shape) for shape in SHAPES], "product": ops.cpu_backend()}


def decode(model: str, calibration: str) -> dict[str, Any]:
    """One layer at few tokens, then tokens per second of whole models, one sequence."""
    rows = [layer(tokens, *shape) for shape in DECODE_LAYERS for tokens in DECODE_TOKENS]
    models = {
        name: AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        for name, dtype in (("bf16", torch.bfloat16), ("float32", torch.float32))
    }
    with tempfile.TemporaryDirectory() as folder:
        for recipe in RECIPES:
            out = Path(folder) / recipe
            with torch.enable_grad():
                mergequant.quantize(model, recipe, data=calibration, out=out, samples=4, seqlen=256)
            models[recipe] = mergequant.load(out, dtype=torch.bfloat16)
    speeds = [row | {"of": Path(model).name} for row in tokens_per_second(models)]
    config = AutoConfig.from_pretrained(model)
    config.update(WIDE)
    models = {"bf16": AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()}
    models["w4a8, random codes"] = with_random_codes(copy.deepcopy(models["bf16"]))
    speeds += [row | {"of": "wide"} for row in tokens_per_second(models)]
    product = ops.cpu_backend()
    protocol = {"prompt": PROMPT, "new_tokens": NEW_TOKENS, "rounds": ROUNDS, "wide": WIDE}
    return {"rows": rows, "models": speeds, "product": product, "protocol": protocol}


def with_random_codes(model: Any) -> Any:
    """The layers of `mergequant-w4a8` in a model of the Llama kind, in place: static norms, rotated o and d."""
    for block in model.model.layers:
        for parent, name in ((block, "input_layernorm"), (block, "post_attention_layernorm")):
            norm = getattr(parent, name)
            channels = norm.weight.shape[0]
            quantized = QuantNorm(NormSpec("rms", channels, channels, 8, norm.variance_epsilon))
            quantized.multiplier.fill_(32)
            setattr(parent, name, quantized)
        for parent in (block.self_attn, block.mlp):
            for name, float_layer in list(parent.named_children()):
                if not isinstance(float_layer, torch.nn.Linear):
                    continue
                outputs, width = float_layer.weight.shape
                spec = InputSpec("codes", width, width, 8)
                if name in ("o_proj", "down_proj"):
                    spec = InputSpec("static", width, width, 8, ops.rotation(width).name)
                linear = QuantLinear(LinearSpec(outputs, spec, 4)).to(torch.bfloat16)
                linear.weight_codes.random_()
                linear.weight_scale.fill_(1 / (4 * 32 * width**0.5))
                setattr(parent, name, linear)
    return model


def tokens_per_second(models: dict[str, Any]) -> list[dict[str, Any]]:
    """Speed of models that take turns, one of them named bf16."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, loaded in models.items():
            times[name].append(token_seconds(loaded))
    speeds = []
    for name, own in times.items():
        ratios = [theirs / mine for theirs, mine in zip(times["bf16"], own)]
        row = {"model": name, "tokens_per_second": round(1 / min(own), 1)}
        row |= {"over_bf16": round(min(times["bf16"]) / min(own), 3)}
        row |= {"median_over_bf16": round(statistics.median(ratios), 3)}
        speeds.append(row)
        print(row, flush=True)
    return speeds


def token_seconds(model: Any) -> float:
    """Least seconds that a model takes for one token after a prompt, with transformers' dynamic cache."""
    prompt = torch.randint(100, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    prompt[0, 0] = model.config.bos_token_id
    cache, best = DynamicCache(), float("inf")
    token = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)
    for _ in range(NEW_TOKENS):
        started = time.perf_counter()
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        best = min(best, time.perf_counter() - started)
    return best


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
    parser.add_argument("what", choices=["linear", "decode", "quantize"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model")
    parser.add_argument("--calibration")
    parser.add_argument("--recipe", default="mergequant")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    if arguments.what != "linear" and not (arguments.model and arguments.calibration):
        parser.error(f"{arguments.what} needs --model and --calibration")
    if arguments.what == "linear":
        found = linear()
    elif arguments.what == "decode":
        found = decode(arguments.model, arguments.calibration)
    else:
        found = quantize(arguments.model, arguments.calibration, arguments.recipe)
    found |= {"threads": arguments.threads, "torch": torch.__version__, "python": platform.python_version()}
    found["cpu_capability"] = torch.backends.cpu.get_cpu_capability()
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
