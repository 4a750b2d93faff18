"""One scheme in vLLM's engine, measured in a process of its own; started by `run`.

    python engine.py FOLDER OUT.json SETTINGS

SETTINGS are '{"arguments": {...}, "tensor_parallel": 1, "together": 1, "kv": "auto", "quick": false}'.

Greedy, no tokenizer, prefix caching off, CUDA graphs and torch.compile on as vLLM sets them, the same memory for keys
and values in all.
"""

import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

KV_GIB = 20.75
PREFILL, DECODE_CONTEXT, NEW = 2048, 512, 128
BATCHES = (1, 16, 64)
TIMED_STEPS = 64
MOST_MEMORY = 0.9
POLL = 0.1  # seconds
EMPTY_STEP = 0.5  # ms; a step without tokens takes less


def main() -> None:
    """Build the engine, measure, write the figures; an error becomes part of them."""
    folder, out, given = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    started, figures = time.perf_counter(), dict[str, Any]()
    try:
        engine = build(folder, given)
        figures["start_seconds"] = time.perf_counter() - started
        figures["workers"] = engine.collective_rpc("probe_model")
        out.with_suffix(".ready").touch()
        while not out.with_suffix(".turn").exists():  # others on this GPU are still starting, or measuring
            time.sleep(POLL)
        measure(engine, figures, quick=given["quick"])
    except Exception as error:  # another scheme shall still be measured
        figures["error"] = f"{type(error).__name__}: {error}"[:1000]
    partial = out.with_suffix(".partial")
    partial.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    partial.replace(out)
    os._exit(0)  # engines are slow to end


def build(folder: Path, given: dict[str, Any]) -> Any:
    """The engine, with the probes in its workers."""
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # greedy; FlashInfer may be missing
    import probes
    from vllm import LLM

    from mergequant.integrations.vllm import register

    register()  # as the entry point does where the package is installed

    whole = any(folder.glob("*.safetensors"))
    return LLM(
        model=str(folder),
        load_format="auto" if whole else probes.LOAD_FORMAT,
        worker_extension_cls="probes.Probe",
        tensor_parallel_size=given["tensor_parallel"],
        kv_cache_dtype=given["kv"],
        kv_cache_memory_bytes=int(KV_GIB * 2**30) // given["tensor_parallel"],
        gpu_memory_utilization=MOST_MEMORY / given["together"],  # must be free when the engine starts
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=PREFILL + NEW + TIMED_STEPS,
        max_num_seqs=max(BATCHES),
        max_num_batched_tokens=16384,
        enable_prefix_caching=False,
        disable_log_stats=True,
        seed=0,
        **given["arguments"],
    )


def measure(engine: Any, figures: dict[str, Any], *, quick: bool) -> None:
    """Fill `figures`; milliseconds and tokens per second. `quick` leaves repetitions out."""
    generator = random.Random(0)

    def run(batch: int, tokens: int, new: int) -> float:
        from vllm import SamplingParams

        prompts = [{"prompt_token_ids": [generator.randrange(3, 31990) for _ in range(tokens)]} for _ in range(batch)]
        settings = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        started = time.perf_counter()
        made = engine.generate(prompts, settings, use_tqdm=False)
        seconds = time.perf_counter() - started
        lengths = {len(each.outputs[0].token_ids) for each in made}
        if len(made) != batch or lengths != {new}:
            raise RuntimeError(f"{len(made)} of {batch} requests came back, with {lengths} tokens instead of {new}")
        return seconds

    def seconds(batch: int, tokens: int, new: int, count: int) -> float:
        return statistics.median(run(batch, tokens, new) for _ in range(1 if quick else count))

    def gpu(batch: int, tokens: int, new: int) -> dict[str, list[float]]:
        engine.collective_rpc("probe_start")
        run(batch, tokens, new)
        found: dict[str, list[float]] = engine.collective_rpc("probe_stop")[0]
        return found

    for batch in (1, 16):
        run(batch, PREFILL, 1)
        wall = seconds(batch, PREFILL, 1, 5)
        steps = [step for step in gpu(batch, PREFILL, 1)["steps"] if step > EMPTY_STEP]
        figures[f"prefill_{batch}"] = {
            "wall_ms": 1e3 * wall,
            "gpu_ms": sum(steps),
            "tokens_per_second": batch * PREFILL / wall,
        }
    for batch in BATCHES:
        run(batch, DECODE_CONTEXT, 8)
        per_token = (seconds(batch, DECODE_CONTEXT, NEW, 3) - seconds(batch, DECODE_CONTEXT, 1, 3)) / (NEW - 1)
        graphs = gpu(batch, DECODE_CONTEXT, TIMED_STEPS)["graphs"][-TIMED_STEPS + 4 :]
        figures[f"decode_{batch}"] = {
            "wall_ms": 1e3 * per_token,
            "gpu_ms": statistics.median(graphs) if graphs else None,
        }
    figures["end_to_end"] = {"tokens_per_second": 16 * NEW / seconds(16, PREFILL, NEW, 2)}


if __name__ == "__main__":
    main()
