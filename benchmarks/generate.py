"""`model.generate` of a served checkpoint against the loop that `mergequant bench` times: milliseconds per token.

    python benchmarks/generate.py DIR [--kv 4] [--batch 1] [--prompt 512] [--tokens 512] [--json OUT]
    python benchmarks/generate.py --shape llama-2-7b [--layers 8] ...      # random weights, quantized on the spot

Both run the very same decoder, in turns. `loop` is one captured decode step in the middle of the generated text, as
`mergequant bench --phases decode` times it: no sampling of text, no host. `generate` is the wall time of
`model.generate(..., max_new_tokens=TOKENS)` less that of one new token (the prompt), for each further token; it
includes the choice of the token, the host's loop and the way of the tokens to the host. A streamer would add its own
printing. Exits with 1 if generate is more than 10 % slower.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mergequant
from mergequant.bench.machine import describe_device, versions
from mergequant.bench.shapes import named_shape
from mergequant.bench.timing import capture, times
from mergequant.integrations.transformers.serve import serve
from mergequant.runtime import DecoderShape

TURNS = 5
ALLOWED = 1.10
# Quick to make; the tensors' sizes, and so all times, are those of `mergequant-w4a8`.
QUICK = {"rounding": "rtn", "compensation": "none", "clip": "none", "split": 0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--shape")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--kv", type=int, choices=(16, 8, 4), default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if (arguments.folder is None) == (arguments.shape is None):
        parser.error("give either DIR or --shape")
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or make(arguments.shape, arguments.layers, Path(scratch) / "model")
        report = measure(folder, arguments.kv, arguments.batch, arguments.prompt, arguments.tokens)
    report |= {"model": str(arguments.folder.name if arguments.folder else arguments.shape), "layers": arguments.layers}
    report["command"] = " ".join(["python", "benchmarks/generate.py", *sys.argv[1:]])
    print(json.dumps(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(report["ratio"] > ALLOWED)


def llama(shape: DecoderShape, layers: int) -> LlamaConfig:
    """The config of a Llama model of some shape."""
    return LlamaConfig(
        hidden_size=shape.channels,
        intermediate_size=shape.ffn,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_width,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.positions,
        rms_norm_eps=shape.eps,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )


def make(name: str, layers: int | None, out: Path) -> Path:
    """A checkpoint of a named shape with random weights."""
    shape = named_shape(name)
    config = llama(shape, layers or shape.layers)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    tokens = torch.randint(3, shape.vocabulary, (8, 256))
    tokens[:, 0] = 1
    mergequant.quantize(model.cpu(), "mergequant-w4a8", data=tokens, out=out, samples=4, seqlen=256, device="cuda",
                        settings=QUICK)  # fmt: skip
    return out


@torch.no_grad()
def measure(folder: Path, kv: int, batch: int, prompt: int, tokens: int) -> dict[str, Any]:
    """Both loops on one decoder."""
    device = torch.device("cuda", torch.cuda.current_device())
    model = mergequant.load(folder, device=device, serve=False, dtype=torch.bfloat16)
    server = serve(model, kv)
    model.generation_config.eos_token_id = None  # every row gets all of its tokens
    ids = torch.randint(3, model.config.vocab_size, (batch, prompt), device=device)
    ids[:, 0] = model.config.bos_token_id
    mask = torch.ones_like(ids)

    def wall(new: int) -> float:
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
        torch.cuda.synchronize(device)
        assert out.shape[1] == prompt + new, "a row ended early"
        return time.perf_counter() - started

    context = prompt + tokens // 2
    decoder = server.decoder
    cache = decoder.new_cache(batch, context)
    last = torch.randint(3, model.config.vocab_size, (batch,), device=device)

    def step() -> None:
        cache.lengths.fill_(context - 1)
        last.copy_(decoder.step(last, cache, context).argmax(-1))

    loop = capture(step, device)
    wall(tokens), wall(1)  # compiles, and captures the graph that later calls replay
    loops, generated = [], []
    for _ in range(TURNS):
        loops.append(statistics.median(times(loop, device, 200)))
        generated.append(1e3 * (wall(tokens) - wall(1)) / (tokens - 1))
    ratios = [own / other for own, other in zip(generated, loops, strict=True)]
    return {
        "device": describe_device(device),
        "versions": versions(device),
        "batch": batch,
        "prompt": prompt,
        "tokens": tokens,
        "kv": kv,
        "loop_ms": round(statistics.median(loops), 4),
        "generate_ms": round(statistics.median(generated), 4),
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(value, 4) for value in ratios],
        "fallbacks": sorted(server.reasons),
    }


if __name__ == "__main__":
    main()
