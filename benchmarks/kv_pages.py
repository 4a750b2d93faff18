"""Times the ops on pages of a quantized cache, which vLLM's cache is served with, beside attention on contiguous rows.

    python benchmarks/kv_pages.py [--json OUT] [--batch 1,16,64] [--context 640,2048] [--bits 8,4]

32 query heads of 128 channels, with 32 key heads (mha) and with 8 (gqa). Caches hold random codes, as many of them as
exceed the L2 cache together. Microseconds of one call, the median replay of a CUDA graph: attention of one token per
row over contiguous rows and over pages of 64 tokens in random order, storing one token per row, storing a prompt of
2048 tokens, and decoding a row of `context` tokens.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergequant import ops
from mergequant.bench.timing import capture, times

HEADS, WIDTH, PAGE, PROMPT = 32, 128, 64, 2048
KINDS = {"mha": 32, "gqa": 8}  # key heads
COLD_BYTES = 200_000_000  # several times the L2 cache
MOST_COPIES = 24
REPLAYS = 15
COLUMNS = ("contiguous", "pages", "store one", "store 2048", "read")


def main() -> None:
    """Measure all, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--batch", default="1,16,64")
    parser.add_argument("--context", default="640,2048")
    parser.add_argument("--bits", default="8,4")
    given = parser.parse_args()
    batches, contexts, widths = ([int(x) for x in text.split(",")] for text in (given.batch, given.context, given.bits))
    rows = []
    print("| heads, bits, batch, context | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    for kind, key_heads in KINDS.items():
        for bits in widths:
            for batch in batches:
                for context in contexts:
                    row = measure(key_heads, bits, batch, context)
                    rows.append({"heads": kind, "bits": bits, "batch": batch, "context": context, **row})
                    cells = " | ".join(f"{row[name]:.1f}" for name in COLUMNS)
                    print(f"| {kind}, {bits}, {batch}, {context} | {cells} |", flush=True)
    if given.json:
        given.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n")


def measure(key_heads: int, bits: int, batch: int, context: int) -> dict[str, float]:
    """Microseconds of each column."""
    device, each = torch.device("cuda"), -(-context // PAGE)
    options: dict[str, Any] = {"device": device}
    stored = 2 * batch * each * PAGE * key_heads * WIDTH * bits // 8
    copies = max(2, min(MOST_COPIES, COLD_BYTES // stored + 1))
    count = max(batch * each, PROMPT // PAGE)
    shape = (count, 2, key_heads, PAGE, WIDTH * bits // 8)
    pages = [torch.randint(0, 256, shape, dtype=torch.uint8, **options) for _ in range(copies)]
    rows = [
        page[: batch * each].view(batch, each, *shape[1:]).permute(2, 0, 3, 1, 4, 5).flatten(3, 4).contiguous()
        for page in pages
    ]
    table = torch.randperm(count, **options)[: batch * each].view(batch, each).int()
    lengths = torch.full((batch,), context, dtype=torch.int32, **options)
    scales = torch.rand(2, key_heads, WIDTH, **options) + 0.1
    q, out = torch.randn(2, batch, HEADS, WIDTH, dtype=torch.bfloat16, **options)
    new = torch.randn(PROMPT, 3 * key_heads, WIDTH, dtype=torch.bfloat16, **options)
    key, value = new[:, :key_heads], new[:, 2 * key_heads :]
    slots = torch.arange(PROMPT, **options)
    last = table[:, -1].long() * PAGE + (context - 1) % PAGE
    bounds = torch.tensor([0, context], dtype=torch.int32, **options)
    room = torch.empty(2, context, key_heads, WIDTH, dtype=torch.bfloat16, **options)

    def read(copy: int) -> None:
        none = torch.zeros_like(bounds)
        ops.kv_page_read(pages[copy], table[:1], bounds, key, value, none, *scales, bits, context, *room)

    calls: dict[str, Callable[[int], Tensor | None]] = {
        "contiguous": lambda copy: ops.kv_attention(q, *rows[copy], lengths, *scales, WIDTH**-0.5, bits, context),
        "pages": lambda copy: ops.kv_page_attention(
            q, pages[copy], table, lengths, *scales, WIDTH**-0.5, bits, context, out
        ),
        "store one": lambda copy: ops.kv_store(key[:batch], value[:batch], last, pages[copy], *scales, bits),
        "store 2048": lambda copy: ops.kv_store(key, value, slots, pages[copy], *scales, bits),
        "read": read,
    }
    return {name: microseconds(call, copies, device) for name, call in calls.items()}


def microseconds(call: Callable[[int], Any], copies: int, device: torch.device) -> float:
    """Of one call, in a graph of one for each copy."""
    replay = capture(lambda: [call(copy) for copy in range(copies)], device)
    replay()
    return statistics.median(times(replay, device, REPLAYS)) * 1e3 / copies


if __name__ == "__main__":
    main()
