"""Run by `test_memory.py` in a process of its own: quantizes models of two depths and prints how memory went.

    python memory_run.py FOLDER SHALLOW DEEP

The models are written shard by shard and are never held whole. Prints for each depth, in bytes: what private memory
held before the run, its peak during the run, and the size of the weights; and last the peak of loading the deep model.
"""

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

import mergequant

HIDDEN, INNER, VOCABULARY = 320, 896, 97
RECIPE = ("mergequant", {"split": 0, "clip": "none", "compensation": "none", "rounding": "rtn"})
QUICK = {"round.clip": False, "token_input.search": False}


def write_model(folder: Path, blocks: int) -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=blocks,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=64,
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}

    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    def save(shard: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, shard))

    outside = {"model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN), "lm_head.weight": matrix(VOCABULARY, HIDDEN)}
    save("outside.safetensors", {**outside, "model.norm.weight": torch.ones(HIDDEN)})
    for index in range(blocks):
        own = {f"self_attn.{name}_proj": matrix(HIDDEN, HIDDEN) for name in "qkvo"}
        own |= {f"mlp.{name}_proj": matrix(INNER, HIDDEN) for name in ("gate", "up")}
        own |= {"mlp.down_proj": matrix(HIDDEN, INNER)}
        own |= {f"{name}_layernorm": torch.ones(HIDDEN) for name in ("input", "post_attention")}
        name = f"model.layers.{index}"
        save(f"block-{index}.safetensors", {f"{name}.{path}.weight": tensor for path, tensor in own.items()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def private_bytes() -> int:
    """Anonymous resident memory: what is mapped from the weights' files costs nothing that cannot be taken back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon"))) * 1024


def watch(work: Callable[[], object]) -> tuple[int, int]:
    """Memory before, and the most of it while `work` ran."""
    before = private_bytes()
    peak = [before]
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], private_bytes())

    watcher = threading.Thread(target=look)
    watcher.start()
    kept = work()  # held until the last look
    peak[0] = max(peak[0], private_bytes())
    done.set()
    watcher.join()
    del kept
    return before, peak[0]


def main() -> None:
    torch.set_num_threads(1)
    base = Path(sys.argv[1])
    tokens = torch.randint(3, VOCABULARY, (6, 24), generator=torch.Generator().manual_seed(7))
    name, settings = RECIPE

    def quantize(depth: int) -> object:
        out, settings_now = base / f"{depth}-quantized", {**settings, **QUICK}
        folder = base / str(depth)
        return mergequant.quantize(folder, name, settings=settings_now, data=tokens, samples=4, seqlen=24, out=out)

    report = []
    for depth in map(int, sys.argv[2:]):
        (base / str(depth)).mkdir()
        write_model(base / str(depth), depth)
        before, peak = watch(lambda depth=depth: quantize(depth))
        size = sum(path.stat().st_size for path in (base / str(depth)).glob("*.safetensors"))
        report.append({"before": before, "peak": peak, "weights": size})
    before, peak = watch(lambda: AutoModelForCausalLM.from_pretrained(base / sys.argv[3], dtype=torch.float64))
    print(json.dumps([*report, {"before": before, "peak": peak, "weights": report[-1]["weights"]}]))


if __name__ == "__main__":
    main()
