"""Tables and pictures of docs/results.md from the runs under benchmarks/results/.

    python benchmarks/render.py            # rewrite the tables in docs/results.md, draw pictures that are out of date
    python benchmarks/render.py --check    # exit 1 if the document and the runs disagree

The document holds markers `<!-- KIND:FILE -->` and `<!-- end -->`, KIND being a key of `MAKERS`; what stands between
them is made here and is not edited by hand. The runs of `mergequant bench` are made by `benchmarks/gpu.sh`.
"""

import argparse
import json
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import family
import weight_speed
import weights
from family import GOAL_TEXT, mean_and_spread

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "results.md"
PICTURES = DOCUMENT.parent
RESULTS = ROOT / "benchmarks" / "results"
SECTION = re.compile(r"(<!-- (\w+):(\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
# Increase of the mean NLL on `ref` and `ref_outlier`: to accept, to aim for, and beyond (None: not set).
GOALS: dict[str, tuple[tuple[float | None, float | None], ...]] = {
    "gptq W4A16": ((0.022, 0.028), (0.015, 0.023), (None, None)),
    "mergequant": ((0.27, 0.25), (0.22, 0.20), (None, None)),
    "mergequant-plus": ((0.065, 0.072), (0.053, 0.060), (0.045, 0.048)),
    "mergequant-plus, o/d int8 by QSM": ((0.060, 0.065), (0.052, 0.054), (0.036, 0.038)),
    "mergequant-w4a8": ((0.024, 0.022), (0.016, 0.013), (0.012, 0.010)),
}


def table(runs: dict[str, Any]) -> str:
    """One Markdown table: a row per recipe, mean and spread (highest minus lowest) over seeds, per model and text."""
    rows = runs["rows"]
    models = sorted({row["model"] for row in rows})
    texts = list(dict.fromkeys(name for row in rows for name in row["eval"]))
    labels = list(dict.fromkeys(row["label"] for row in rows))
    labels.sort(key=runs["order"].index)
    columns = [f"{model}, {text}" for model in models for text in texts]
    more = all("activation_bits" in row for row in rows)  # runs of before have no such figures
    lines = ["| recipe | " + " | ".join(columns) + " | KL | top-1 | linear bits |" + " act bits | s |" * more]
    lines.append("|---|" + "---|" * (len(columns) + 3 + 2 * more))
    floats = {(row["model"], text): row["eval"][text]["float_perplexity"] for row in rows for text in texts}
    shown = " | ".join(f"ppl {floats[model, text]:.2f}" for model in models for text in texts)
    lines.append(f"| float | {shown} | - | - | 16 |" + " 16 | - |" * more)
    for label in labels:
        own = [row for row in rows if row["label"] == label]
        cells = []
        for model in models:
            for text in texts:
                values = [row["eval"][text]["d"] for row in own if row["model"] == model]
                cells.append(mean_and_spread(values))
        kl = " / ".join(_of_model(own, model, texts[0], "kl_mean", "{:.3f}") for model in models)
        top = " / ".join(_of_model(own, model, texts[0], "top1_agreement", "{:.1%}") for model in models)
        bits = statistics.mean(row["linear_bits_per_parameter"] for row in own)
        line = f"| {label} | " + " | ".join(cells) + f" | {kl} | {top} | {bits:.2f} |"
        if more:
            widths, times = ([row[key] for row in own] for key in ("activation_bits", "seconds"))
            line += f" {statistics.mean(widths):.1f} | {statistics.mean(times):.0f} |"
        lines.append(line)
    return "\n".join([*lines, "", _protocol(runs, models, texts)]) + "\n"


def _protocol(runs: dict[str, Any], models: list[str], texts: list[str]) -> str:
    """How and where the figures of a table were made."""
    seeds = len({row["seed"] for row in runs["rows"]})
    spread = (
        f"mean of {seeds} calibration seeds ± half of highest minus lowest" if seeds > 1 else "one calibration seed"
    )
    runs_of = Counter((row["model"], row["label"], row.get("kv_bits", 16)) for row in runs["rows"])
    if seeds > 1 and 1 in runs_of.values():
        spread += ", one seed where no spread is given"
    return f"D in nats, {spread}. KL and top-1 agreement on {texts[0]}, {' / '.join(models)}. {family.provenance(runs)}"


def _of_model(rows: list[dict[str, Any]], model: str, text: str, key: str, form: str) -> str:
    values = [row["eval"][text][key] for row in rows if row["model"] == model]
    return form.format(statistics.mean(values)) if values else "-"


def goals(runs: dict[str, Any]) -> str:
    """What was aimed for before, and what was reached, on both reference models."""
    lines = ["| recipe | accept | target | stretch | `ref` | `ref_outlier` |", "|---|---|---|---|---|---|"]
    for label, levels in GOALS.items():
        shown = [" / ".join("-" if value is None else f"{value:.3f}" for value in level) for level in levels]
        cells = []
        for place, model in enumerate(("ref", "ref_outlier")):
            own = [row for row in runs["rows"] if row["label"] == label and row["model"] == model]
            reached = statistics.mean(row["eval"][GOAL_TEXT]["d"] for row in own)
            met = [
                name
                for name, level in zip(("accept", "target", "stretch"), levels)
                if (bound := level[place]) is not None and reached <= bound
            ]
            cells.append(f"{reached:.4f} ({met[-1] if met else 'missed'})")
        lines.append(f"| {label} | " + " | ".join([*shown, *cells]) + " |")
    return "\n".join(lines) + "\n"


def kv(runs: dict[str, Any]) -> str:
    """D by the width of cached keys and values."""
    rows = runs["rows"]
    models = sorted({row["model"] for row in rows})
    texts = list(rows[0]["eval"])
    head = [f"{model}, {text}" for model in models for text in texts]
    lines = ["| recipe | keys and values | " + " | ".join([*head, "KL", "top-1"]) + " |"]
    lines.append("|---" * (len(head) + 4) + "|")
    for label in runs["order"]:
        for bits in sorted({row["kv_bits"] for row in rows}, reverse=True):
            own = [row for row in rows if (row["label"], row["kv_bits"]) == (label, bits)]
            cells = [
                mean_and_spread([row["eval"][text]["d"] for row in own if row["model"] == model])
                for model in models
                for text in texts
            ]
            cells.append(" / ".join(_of_model(own, model, texts[0], "kl_mean", "{:.4f}") for model in models))
            cells.append(" / ".join(_of_model(own, model, texts[0], "top1_agreement", "{:.1%}") for model in models))
            width = f"{bits} bits" if bits < 16 else "float"
            lines.append(f"| {label} | {width} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _protocol(runs, models, texts)]) + "\n"


def linear(runs: dict[str, Any]) -> str:
    """Times of one linear layer on a CPU."""
    return f"{_layers(runs)}\n`python benchmarks/cpu.py linear`; {_where(runs)}.\n"


def cpu_decode(runs: dict[str, Any]) -> str:
    """Layers at few tokens and whole models, one token at a time, on a CPU."""
    wide = runs["protocol"]["wide"]
    shape = f"{wide['num_hidden_layers']} blocks, hidden {wide['hidden_size']}, ffn {wide['intermediate_size']}"
    lines = ["| model | weights | tokens/s | vs bf16 |", "|---|---|---|---|"]
    for row in runs["models"]:
        of = f"random, {shape}" if row["of"] == "wide" else f"`{row['of']}`"
        lines.append(f"| {of} | {row['model']} | {row['tokens_per_second']} | {row['over_bf16']:.2f}x |")
    how = f"`python benchmarks/cpu.py decode --threads {runs['threads']}`; {_where(runs)}"
    return "\n".join([_layers(runs), *lines, "", f"{how}."]) + "\n"


def _layers(runs: dict[str, Any]) -> str:
    lines = [
        "| tokens x width x outputs | int8 codes, ms | fake quantization | in bf16 | bf16 |",
        "|---|---|---|---|---|",
    ]
    for row in runs["rows"]:
        cells = [f"{row['tokens']} x {row['width']} x {row['outputs']}", f"{row['integer_ms']:.3f}"]
        for name in ("fake", "fake_bf16", "bf16"):
            cells.append(f"{row[f'{name}_ms']:.3f} ({row[f'{name}_over_integer']:.2f}x)")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _where(runs: dict[str, Any]) -> str:
    threads = "1 thread" if runs["threads"] == 1 else f"{runs['threads']} threads"
    return f"{threads}, {runs['product']}, torch {runs['torch']}, python {runs['python']}"


def quantize(runs: dict[str, Any]) -> str:
    """Where quantizing spends its time."""
    total = runs["seconds"]
    parts = ", ".join(f"{name} {value / total:.0%}" for name, value in runs["seconds_by_step"].items() if value > 0.5)
    return (
        f"`{runs['recipe']}` on `{runs['model']}`: **{total:.0f} s**, peak memory **{runs['peak_rss_mb']} MB**, "
        f"linear layers {runs['linear_bits_per_parameter']:.2f} bits per parameter. Time: {parts}.\n"
    )


# Figures of `mergequant bench`, by what is compared: to accept, to aim for, and beyond.
SPEED_GOALS: tuple[tuple[str, dict[str, Any], str, tuple[float, float, float]], ...] = (
    ("GEMM, 2048 rows and more, sustained TOPS", {"phase": "gemm", "mode": "sustained"}, "tops", (1300, 1500, 1650)),
    ("GEMM at 128 to 512 rows, against fp8", {"phase": "gemm", "batch": (128, 256, 512)}, "vs_fp8", (1.0, 1.2, 1.4)),
    ("prefill 1 x 2048, against bf16", {"phase": "prefill", "batch": 1, "context": 2048}, "vs_bf16", (1.9, 2.2, 2.35)),
    ("prefill 1 x 2048, against fp8", {"phase": "prefill", "batch": 1, "context": 2048}, "vs_fp8", (1.15, 1.3, 1.4)),
    (
        "decode 1 x 2048, kv8 or kv4, against bf16",
        {"phase": "decode", "batch": 1, "kv": (8, 4)},
        "vs_bf16",
        (2.5, 2.9, 3.7),
    ),
    (
        "decode 1 x 2048, kv8 or kv4, against fp8",
        {"phase": "decode", "batch": 1, "kv": (8, 4)},
        "vs_fp8",
        (2.1, 2.4, 3.1),
    ),
    ("decode 16 x 2048, kv4, against bf16", {"phase": "decode", "batch": 16, "kv": 4}, "vs_bf16", (2.5, 3.0, 3.5)),
    (
        "decode 64 x 2048, kv4, against bf16",
        {"phase": "decode", "batch": 64, "context": 2048, "kv": 4},
        "vs_bf16",
        (2.5, 3.0, 3.4),
    ),
    ("end to end 16 x (1024 + 256), kv4, against bf16", {"phase": "e2e", "batch": 16}, "vs_bf16", (2.1, 2.5, 2.9)),
    ("weights, times smaller than bf16", {"phase": "memory", "what": "weights"}, "vs_bf16", (3.5, 3.5, 3.85)),
    (
        "peak memory at 16 x 2048, kv4, times smaller than bf16",
        {"phase": "memory", "what": "peak", "batch": 16, "kv": 4},
        "vs_bf16",
        (3.3, 3.5, 3.85),
    ),
)
LOWEST_COUNTS = ("gemm",)  # phases in which a goal is for every layer; elsewhere one row (or the better cache) counts
CEILINGS = {
    "read_tb_s": "read, several GB, TB/s",
    "launch_us": "kernel that does nothing, in a CUDA graph, us",
    "int8_burst_tops": "int8 wgmma, burst, TOPS",
    "int8_sustained_tops": "int8 wgmma, sustained, TOPS",
    "bf16_burst_tops": "bf16 cuBLAS 8192^3, burst, TFLOPS",
    "bf16_sustained_tops": "bf16 cuBLAS 8192^3, sustained, TFLOPS",
    "fp8_burst_tops": "fp8 cuBLAS 8192^3, burst, TFLOPS",
    "fp8_sustained_tops": "fp8 cuBLAS 8192^3, sustained, TFLOPS",
}
MEASURED_PRODUCTS = {"phase": "gemm", "batch": 2048, "mode": "sustained"}
# Ops of tune_elementwise.py that differ by where the step comes from.
ELEMENTWISE = {
    "norm, static": "norm, static step",
    "norm, dynamic, one kernel": "norm, step of a token, one kernel",
    "norm, dynamic, two kernels": "norm, step of a token, two kernels",
    "silu_mul, static": "SwiGLU, static step",
    "silu_mul, dynamic": "SwiGLU, step of a token",
    "hadamard, static": "Hadamard, static step",
    "hadamard, dynamic": "Hadamard, step of a token",
}
LAYERS = 32  # of Llama-2-7B
_SAVED = {
    ("norm, dynamic, one kernel", 4096): 2,
    ("norm, static", 4096): -2,
    ("hadamard, dynamic", 4096): 1,
    ("hadamard, static", 4096): -1,
    ("hadamard, dynamic", 11008): 1,
    ("hadamard, static", 11008): -1,
}
_ROTATED = {("hadamard, static", 4096): 1, ("hadamard, static", 11008): 1, ("silu_mul", 11008): 1}
# Sums over the ops of a layer, by tokens: (op, width) and how often it is added.
DIFFERENCES: dict[str, dict[int, dict[tuple[str, int], int]]] = {
    "a step for each token, fused into norm and rotation, instead of static ones": dict.fromkeys((1, 2048), _SAVED),
    # Without rotation decode attention makes o's codes itself; after a prompt's attention `static_quant` does.
    "the online Hadamards of o and down, and SwiGLU in a kernel of its own": {
        1: _ROTATED,
        2048: {**_ROTATED, ("static_quant", 4096): -1},
    },
}
Row = dict[str, Any]


def speed_goals(run: dict[str, Any]) -> str:
    """What was aimed for before, and what was reached."""
    lines = ["| | accept | target | stretch | reached |", "|---|---|---|---|---|"]
    for name, wanted, key, levels in SPEED_GOALS:
        own = [row for row in _select(run, {"scheme": "w4a8", **wanted}) if row[key] is not None]
        shown = "not measured"
        if own:
            values = sorted(row[key] for row in own)
            reached = values[0] if wanted["phase"] in LOWEST_COUNTS else values[-1]
            met = [level for level, bound in zip(("accept", "target", "stretch"), levels) if reached >= bound]
            extent = (
                f"{_plain(values[0])} to {_plain(values[-1])}" if reached == values[0] < values[-1] else _plain(reached)
            )
            shown = f"{extent} ({met[-1] if met else 'missed'})"
        lines.append(f"| {name} | " + " | ".join([*map(_plain, levels), shown]) + " |")
    return "\n".join(lines) + "\n"


def ceilings(run: dict[str, Any]) -> str:
    """What the machine did at best, in the same run, and where it ran."""
    found = run["ceilings"]
    lines = ["| ceiling | |", "|---|---|"]
    lines += [f"| {text} | {_plain(found[key])} |" for key, text in CEILINGS.items() if key in found]
    sizes = ", ".join(f"{rate:.2f} at {size} MB" for size, rate in found["read_tb_s_by_mb"].items())
    lines.append(f"| read, one kernel, TB/s | {sizes} |")
    versions = ", ".join(f"{key} {value}" for key, value in run["versions"].items() if value)
    clocks = "; ".join(
        f"{when} {now['sm_mhz']:.0f} MHz, {now['watts']:.0f} W, {now['celsius']:.0f} °C"
        for when, now in run["device"]["clocks"].items()
        if now and None not in now.values()
    )
    where = f"{run['device']['name']}, power limit {_plain(run['device']['power_limit_watts'])} W; clocks {clocks}"
    return "\n".join([*lines, "", f"`{run['command']}` on {where}; {versions}; {run['seconds']:.0f} s."]) + "\n"


def speed(phase: str) -> Callable[[dict[str, Any]], str]:
    """Maker of the table of a phase: schemes of a cell under one another."""

    def make(run: dict[str, Any]) -> str:
        rate = {"prefill": "TOPS", "decode": "GB/s", "e2e": "tokens/s"}[phase]
        lines = [
            f"| sequences x tokens | scheme | ms | {rate} | vs bf16 | vs fp8 | of ceiling | spread |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in _select(run, {"phase": phase}):
            new = f" + {row['new_tokens']}" if row["new_tokens"] else ""
            done = row["batch"] * (row["new_tokens"] or 0) / row["ms"] * 1e3
            value = {"prefill": row["tops"], "decode": row["gb_s"], "e2e": done}[phase]
            cells = [f"{row['batch']} x {row['context']}{new}", f"{row['scheme']} kv{row['kv']}", _plain(row["ms"])]
            lines.append("| " + " | ".join([*cells, f"{value:,.0f}", *_ratios(row), f"{row['spread']:.1%}"]) + " |")
        return "\n".join(lines) + "\n"

    return make


def gemm(run: dict[str, Any]) -> str:
    """One line per layer and number of rows: our time, and how it compares."""
    lines = [
        "| layer | rows | mode | w4a8 us | TOPS | GB/s | of ceiling | vs bf16 | vs fp8 | w8a8 vs bf16 | vs fp8 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in _select(run, {"phase": "gemm", "scheme": "w4a8"}):
        where = {key: row[key] for key in ("phase", "what", "batch", "mode")}
        wide = _select(run, {**where, "scheme": "w8a8"})
        cells = [row["what"], str(row["batch"]), row["mode"], _plain(row["ms"] * 1e3), f"{row['tops']:,.0f}"]
        both = _ratios(row)
        other = _ratios(wide[0])[:2] if wide else ["-", "-"]
        lines.append("| " + " | ".join([*cells, f"{row['gb_s']:,.0f}", both[2], *both[:2], *other]) + " |")
    return "\n".join(lines) + "\n"


def memory(run: dict[str, Any]) -> str:
    """Weights, cache and peak of each scheme, alone on the device."""
    lines = ["| | scheme | GB | vs bf16 | vs fp8 |", "|---|---|---|---|---|"]
    for row in _select(run, {"phase": "memory"}):
        where = row["what"] if row["batch"] is None else f"{row['what']}, {row['batch']} x {row['context']}"
        scheme = row["scheme"] if row["kv"] is None else f"{row['scheme']} kv{row['kv']}"
        lines.append("| " + " | ".join([where, scheme, f"{row['gb']:.2f}", *_ratios(row)[:2]]) + " |")
    return "\n".join(lines) + "\n"


def bound(run: dict[str, Any]) -> str:
    """How much faster than bf16 a prefill of 1 x 2048 could be if nothing but products and attention took time."""
    tokens, shape, found = 2048, run["shape"], run["ceilings"]
    rows = _select(run, {"phase": "prefill", "batch": 1, "context": tokens, "scheme": "w4a8"})
    if not rows:
        return "The run has no prefill of 1 x 2048.\n"
    products = rows[0]["tops"] * rows[0]["ms"] / 1e3  # 10^12 operations of the linear layers
    attention = 2 * tokens**2 * shape["heads"] * shape["head_width"] * shape["layers"] / 1e12
    lines = ["| products at | bf16 ms | w4a8 ms | ratio |", "|---|---|---|---|"]
    for mode, title in (("burst", "the ceilings, burst"), ("sustained", "the ceilings, sustained")):
        floats = found[f"bf16_{mode}_tops"]
        both = [1e3 * (products / rate + attention / floats) for rate in (floats, found[f"int8_{mode}_tops"])]
        lines.append(_bound_line(title, *both))
    apart = [
        shape["layers"] * sum(row["ms"] for row in _select(run, {**MEASURED_PRODUCTS, "scheme": scheme}))
        for scheme in ("bf16", "w4a8")
    ]
    if all(apart):
        rest = 1e3 * attention / found["bf16_sustained_tops"]
        lines.append(_bound_line("the rates of the GEMMs below, sustained", *(rest + ms for ms in apart)))
    lines.append(_bound_line("the whole prefill, measured", rows[0]["ms"] * rows[0]["vs_bf16"], rows[0]["ms"]))
    return "\n".join(lines) + "\n"


def _bound_line(title: str, floats: float, integers: float) -> str:
    return f"| {title} | {_plain(floats)} | {_plain(integers)} | {floats / integers:.2f}x |"


def elementwise(runs: dict[str, Any]) -> str:
    """Microseconds of ops with a static step, and with one for each token."""
    times = {(row["op"], row["width"], row["tokens"]): row["us"] for row in runs["rows"]}
    tokens = sorted({count for _, _, count in times})
    lines = ["| us, at so many tokens | " + " | ".join(map(str, tokens)) + " |", "|---" * (len(tokens) + 1) + "|"]
    for op, title in ELEMENTWISE.items():
        for width in sorted({wide for name, wide, _ in times if name == op}):
            cells = [_plain(times.get((op, width, count))) for count in tokens]
            lines.append(f"| {title}, {width} | " + " | ".join(cells) + " |")
    lines += ["", "Summed over the 32 layers of Llama-2-7B, from rows of this run:", ""]
    for title, terms in DIFFERENCES.items():
        sums = [
            f"{LAYERS / 1e3 * sum(count * times[*op, rows] for op, count in terms[rows].items()):.2f} ms at {rows}"
            for rows in terms
            if all((*op, rows) in times for op in terms[rows])
        ]
        lines.append(f"- {title}: {', '.join(sums) or 'not measured'}.")
    versions = ", ".join(f"{key} {value}" for key, value in runs["versions"].items())
    command = COMMANDS["elementwise.json"]
    return "\n".join([*lines, "", f"`{command}` on {runs['device']}; {versions}."]) + "\n"


def attention(runs: dict[str, Any]) -> str:
    """Decode attention by width of the cache, in the division that the package chooses, beside cuDNN on bf16."""
    lines = [
        "| heads | sequences x positions | cuDNN, bf16, us | own, 16 bits | 8 bits, us | TB/s | vs cuDNN "
        "| 4 bits, us | TB/s | vs cuDNN |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in runs["rows"]:
        floats = row["16"]
        cells = [row["kind"], f"{row['batch']} x {row['context']}", _plain(floats["cudnn"])]
        cells.append(_plain(floats.get(floats["chosen"])))
        for bits in ("8", "4"):
            own = row[bits]
            time = own.get(own["chosen"])
            if time is None:
                cells += ["-"] * 3
            else:
                cells += [_plain(time), f"{own['bytes'] / time / 1e6:.2f}", f"{floats['cudnn'] / time:.2f}x"]
        lines.append("| " + " | ".join(cells) + " |")
    command = COMMANDS["kv_attention.json"]
    return "\n".join([*lines, "", f"`{command}` on {runs['device']}, torch {runs['torch']}."]) + "\n"


def generation(run: dict[str, Any]) -> str:
    """`model.generate` beside the loop that the bench times."""
    lines = [
        "| model | batch | kv | the loop of the bench, ms | `generate`, ms a token | ratio |",
        "|---|---|---|---|---|---|",
    ]
    model = run["model"] + (f", {run['layers']} layers" if run["layers"] else "")
    cells = [model, str(run["batch"]), str(run["kv"]), _plain(run["loop_ms"]), _plain(run["generate_ms"])]
    lines.append("| " + " | ".join([*cells, f"{run['ratio']:.3f}x"]) + " |")
    return (
        "\n".join([*lines, "", f"`{run['command']}` on {run['device']['name']}, {_versions(run['versions'])}."]) + "\n"
    )


def backends(run: dict[str, Any]) -> str:
    """Elementwise kernels in Triton and in CUDA."""
    counts = list(dict.fromkeys(row["tokens"] for row in run["rows"]))
    lines = ["| us, Triton / CUDA | " + " | ".join(map(str, counts)) + " |", "|---" * (len(counts) + 1) + "|"]
    for name in dict.fromkeys(row["op"] for row in run["rows"]):
        own = {(row["tokens"], row["backend"]): row["us"] for row in run["rows"] if row["op"] == name}
        cells = [f"{own[count, 'triton']:.2f} / {own[count, 'cuda']:.2f}" for count in counts]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return (
        "\n".join([*lines, "", f"`{run['command']}` on {run['device']['name']}, {_versions(run['versions'])}."]) + "\n"
    )


def _versions(found: dict[str, Any]) -> str:
    return ", ".join(f"{key} {found[key]}" for key in ("torch", "triton", "driver", "nvrtc"))


def notes(run: dict[str, Any]) -> str:
    """What the run itself says about its figures."""
    return "".join(f"- {note}\n" for note in run["notes"]) or "None.\n"


def _select(run: dict[str, Any], wanted: dict[str, Any]) -> list[Row]:
    """Rows whose values are as wanted; a tuple allows several."""
    return [
        row
        for row in run["rows"]
        if all(row[key] in value if isinstance(value, tuple) else row[key] == value for key, value in wanted.items())
    ]


def _ratios(row: Row) -> list[str]:
    shown = [("-" if row[key] is None else f"{row[key]:.2f}x") for key in ("vs_bf16", "vs_fp8")]
    return [*shown, "-" if row["percent_of_ceiling"] is None else f"{row['percent_of_ceiling']:.0f}%"]


def _plain(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def cpu_recipes(runs: dict[str, Any]) -> str:
    """Seconds that recipes take on a CPU, and on which."""
    lines = ["| recipe | s | cores | machine |", "|---|---|---|---|"]
    for row in sorted(runs["rows"], key=lambda row: -row["seconds"]):
        lines.append(f"| {row['label']} | {row['seconds']:.0f} | {row['cores']} | {row['machine']} |")
    return "\n".join(lines) + f"\n\n{runs['about']}\n"


def engine(runs: dict[str, Any]) -> str:
    """Ours and vLLM's own schemes inside vLLM's engine, and how the figures were made."""
    folder = str(ROOT / "benchmarks" / "vllm")
    sys.path.insert(0, folder)
    try:
        from run import table as engine_table
    finally:
        sys.path.remove(folder)
    versions = ", ".join(f"{name} {version}" for name, version in runs["versions"].items())
    how = f"Made by `{runs['command']}` on {runs['gpu']}, {versions}. {runs.get('note', '')}"
    return f"{engine_table(runs)}\n\n{how.strip()}\n"


MAKERS: dict[str, Callable[[dict[str, Any]], str]] = {
    "accuracy": table,
    "goals": goals,
    "marks": family.marks,
    "orders": family.orders,
    "papers": family.papers,
    "absent": family.absent,
    "planted": family.planted,
    "weights": weights.orders,
    "layers": weights.layers,
    "pareto": weights.pareto,
    "times": weights.times,
    "weight_only": weight_speed.table,
    "kv": kv,
    "linear": linear,
    "cpu_decode": cpu_decode,
    "quantize": quantize,
    "cpu_recipes": cpu_recipes,
    "speed_goals": speed_goals,
    "ceilings": ceilings,
    "prefill": speed("prefill"),
    "decode": speed("decode"),
    "e2e": speed("e2e"),
    "gemm": gemm,
    "memory": memory,
    "notes": notes,
    "bound": bound,
    "elementwise": elementwise,
    "attention": attention,
    "generation": generation,
    "backends": backends,
    "engine": engine,
}
NOT_RUN = "Not measured yet; `{}` makes the run on a machine with a GPU.\n"
ACCURACY = (
    "python benchmarks/accuracy.py --suite {0} --model {1} --calibration wikitext2_train.txt --eval wikitext2_test.txt "
    "--eval wiki2018.txt --seeds 3 --device cuda --workers 16 --out benchmarks/results/{0}.json"
)
COMMANDS = {  # that make a run, by its file; `mergequant bench` has a script
    "elementwise.json": "python benchmarks/tune_elementwise.py --json benchmarks/results/elementwise.json",
    "family.json": ACCURACY.format("family", " --model ".join(family.MODELS)),
    "weights.json": ACCURACY.format("weights", " --model ".join(weights.MODELS)),
    "block_time.json": "python benchmarks/block_time.py --out benchmarks/results/block_time.json",
    "weight_only.json": "python benchmarks/weight_only.py --out benchmarks/results/weight_only.json",
    "planted.json": "python benchmarks/planted.py",
    "vllm_llama-2-7b.json": "python benchmarks/vllm/run.py --out benchmarks/results/vllm_llama-2-7b.json",
    "generate.json": "python benchmarks/generate.py --shape llama-2-7b --layers 16",
    "elementwise_backends.json": "python benchmarks/elementwise_backends.py",
    "kv_attention.json": "python benchmarks/tune_kv.py --json benchmarks/results/kv_attention.json",
}


def rendered(document: str) -> str:
    """The document with all tables made anew."""

    def replace(match: re.Match[str]) -> str:
        path = RESULTS / match[3]
        not_run = NOT_RUN.format(COMMANDS.get(match[3], "benchmarks/gpu.sh"))
        made = MAKERS[match[2]](json.loads(path.read_text())) if path.is_file() else not_run
        return match[1] + made + match[4]

    return SECTION.sub(replace, document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    arguments = parser.parse_args()
    before = DOCUMENT.read_text()
    after = rendered(before)
    drawn = [RESULTS / name for _, kind, name, _ in SECTION.findall(before) if kind == "pareto"]
    stale = [
        path for path in drawn if path.is_file() and weights.stale_pictures(json.loads(path.read_text()), PICTURES)
    ]
    if arguments.check:
        if before != after or stale:
            sys.exit("docs/ and benchmarks/results/ disagree; run `python benchmarks/render.py`")
        return
    for path in stale:
        weights.draw_pareto(json.loads(path.read_text()), PICTURES)
    DOCUMENT.write_text(after)


if __name__ == "__main__":
    main()
