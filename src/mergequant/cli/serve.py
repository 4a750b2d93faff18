"""`mergequant serve`: checks that go before `vllm serve`, which then takes over the process."""

import json
import os
import shlex
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import torch

from mergequant import ops
from mergequant.checkpoint import QUANT_METHOD, Checkpoint, count_bits, open_checkpoint
from mergequant.cli.console import Output
from mergequant.cli.options import model_folder
from mergequant.errors import MergeQuantError, UsageError
from mergequant.eval import human_bytes
from mergequant.integrations.vllm import ARCHITECTURES
from mergequant.integrations.vllm.pages import FLOAT_BITS, OPTION, chosen_bits, require_servable
from mergequant.integrations.vllm.sink import require_sink
from mergequant.integrations.vllm.versions import unsupported
from mergequant.nn import LinearSpec

__all__ = ["serve"]

STOCK_METHOD = "compressed-tensors"  # of `mergequant export`; vLLM needs no plugin for it
LEAST_CAPABILITY = (8, 0)
CACHE, EXTRA = "--kv-cache-dtype", "--additional-config"  # vLLM's options; the second for what it does not know
DEFAULTS = {
    CACHE: "auto",
    "--tensor-parallel-size": "1",
    "--gpu-memory-utilization": "0.92",
    "--host": "localhost",
    "--port": "8000",
}
SHORT = {"-tp": "--tensor-parallel-size"}
SHOWN_OPS = ("rmsnorm_quant", "static_quant", "dynamic_quant", "hadamard_quant", "tiled_linear")
CACHE_OPS = ("kv_store", "kv_page_attention", "kv_page_read")


@click.command(
    short_help="Check a checkpoint, then serve it with vLLM.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option("--dry-run", is_flag=True, help="Check, print what would run, and stop.")
@click.option(
    "--kv", type=click.Choice(["16", "8", "4"]), default="16", help="Bits of keys and values; 16: vLLM's own."
)
@click.argument("folder", metavar="DIR")
@click.argument("options", metavar="[VLLM OPTIONS]...", nargs=-1, type=click.UNPROCESSED)
def serve(folder: str, options: tuple[str, ...], dry_run: bool, kv: str) -> None:
    """Serve the quantized checkpoint in DIR with vLLM's OpenAI-compatible server.

    What stands behind DIR goes to `vllm serve` as it is. Before that, the checkpoint, the release of vLLM, the GPUs and
    their memory are checked, and what will run is printed; all faults are reported at once.
    """
    place, output = model_folder(folder), Output(None)
    if int(kv) != FLOAT_BITS:
        if EXTRA in _given(options):
            raise UsageError(f"--kv and {EXTRA}: put {json.dumps({OPTION: int(kv)})[1:-1]} into the latter")
        options = (*options, EXTRA, json.dumps({OPTION: int(kv)}))
    given, problems, bits = {**DEFAULTS, **_given(options)}, [], FLOAT_BITS
    config, checkpoint = _config(place), None
    try:
        checkpoint = _checked(place, config)
        checked = "valid" if checkpoint is not None else "exported: vLLM checks it"
        output.show(f"checkpoint: {human_bytes(_weight_bytes(place, checkpoint))} of weights in memory, {checked}")
        bits = _cache_bits(config, checkpoint, given)
        own = f"keys and values of {bits} bits, by this checkpoint's steps"
        output.show("cache: " + (own if bits != FLOAT_BITS else f"vLLM's own ({CACHE} {given[CACHE]})"))
    except MergeQuantError as error:
        problems.append(str(error))
    output.show(f"vLLM: {_installed('vllm') or 'not installed'}")
    problems += [text for text in [_vllm_fault(stock=checkpoint is None)] if text]
    problems += _gpu_faults(output, place, config, checkpoint, given, bits)
    if checkpoint is not None and torch.cuda.is_available():
        _show_kernels(output, SHOWN_OPS if bits == FLOAT_BITS else SHOWN_OPS + CACHE_OPS)
    command = [_executable(), "serve", str(place), *options]
    name = given.get("--served-model-name", str(place))
    body = json.dumps({"model": name, "prompt": "Once upon a time", "max_tokens": 32})
    url = f"http://{given['--host']}:{given['--port']}/v1/completions"
    output.show(f"start: {shlex.join(command)}")
    output.show(f"ask it: curl {url} -H 'Content-Type: application/json' -d {shlex.quote(body)}")
    if problems:
        raise UsageError(" | ".join(problems))
    if not dry_run:
        sys.stdout.flush()
        os.execvp(command[0], command)


def _given(options: tuple[str, ...]) -> dict[str, str]:
    """Options of vLLM that matter here, by their long name."""
    found: dict[str, str] = {}
    words = [part for word in options for part in (word.split("=", 1) if word.startswith("-") else [word])]
    for word, value in pairwise(words):
        found[SHORT.get(word, word.replace("_", "-"))] = value
    return found


def _config(place: Path) -> dict[str, Any]:
    try:
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{place}: config.json cannot be read ({error}); give the folder of a checkpoint") from error
    return config if isinstance(config, dict) else {}


def _checked(place: Path, config: dict[str, Any]) -> Checkpoint | None:
    """The validated checkpoint; None for an exported one, which vLLM checks by itself.

    Raises:
        CheckpointError: it breaks a rule of the format.
        UsageError: nothing that is quantized, or an architecture or a prefix that the plugin does not serve.
    """
    quantization = config.get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method == STOCK_METHOD:
        return None
    if method != QUANT_METHOD:
        raise UsageError(f"{place} holds no checkpoint of mergequant ({method or 'a float model'}); use `vllm serve`")
    checkpoint = open_checkpoint(place)
    checkpoint.validate()
    if checkpoint.quantization.prefix is not None:
        require_sink(checkpoint.quantization.prefix)
    served = [name for name in config.get("architectures") or [] if name in ARCHITECTURES]
    if not served:
        raise UsageError(
            f"{place}: the plugin serves {', '.join(ARCHITECTURES)}, not {config.get('architectures')}; try "
            "`mergequant export`, which needs no plugin"
        )
    return checkpoint


def _cache_bits(config: dict[str, Any], checkpoint: Checkpoint | None, given: dict[str, str]) -> int:
    """Bits of the cache that is asked for.

    Raises:
        UsageError: the checkpoint cannot be served with it.
    """
    try:
        options = json.loads(given.get(EXTRA, "{}"))
    except ValueError as error:
        raise UsageError(f"{EXTRA} is no JSON: {error}") from error
    bits = chosen_bits(options, given[CACHE])
    if bits != FLOAT_BITS:
        if checkpoint is None:
            raise UsageError("an export has vLLM's own caches alone; serve the checkpoint that it was made of")
        heads, kv_heads, width = _heads(config)
        require_servable(checkpoint.quantization.kv, heads, kv_heads, width)
    return bits


def _heads(config: dict[str, Any]) -> tuple[int, int, int]:
    """Query heads, key heads, and channels of one, by a model's config.json."""
    heads = int(config.get("num_attention_heads") or 1)
    width = config.get("head_dim") or int(config.get("hidden_size", 0)) // heads
    return heads, int(config.get("num_key_value_heads") or heads), int(width)


def _vllm_fault(*, stock: bool) -> str | None:
    found = _installed("vllm")
    return None if stock and found else unsupported(found)


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu_faults(
    output: Output, place: Path, config: dict[str, Any], checkpoint: Checkpoint | None, given: dict[str, str], bits: int
) -> list[str]:
    """Print GPUs and memory; what is wrong with them."""
    try:
        count, share = int(given["--tensor-parallel-size"]), float(given["--gpu-memory-utilization"])
    except ValueError as error:
        return [f"an option of vLLM is no number: {error}"]
    if not torch.cuda.is_available():
        why = "this torch is a build without CUDA" if torch.version.cuda is None else "torch finds no usable GPU"
        output.show(f"GPU: none ({why})")
        return [f"no GPU: {why}; `mergequant generate {place}` runs on a CPU"]
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    output.show(f"GPU: {', '.join(names)}; {count} used")
    if len(names) < count:
        return [f"--tensor-parallel-size {count}, and there are {len(names)} GPUs"]
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        return [f"{names[0]} has compute capability {capability[0]}.{capability[1]}; the kernels need 8.0 or newer"]
    free, whole = torch.cuda.mem_get_info()
    text, fault = memory_report(config, _weight_bytes(place, checkpoint), whole, free, share, count, bits)
    output.show(text)
    return [fault] if fault else []


def memory_report(
    config: dict[str, Any], weights: int, whole: int, free: int, share: float, count: int, bits: int = FLOAT_BITS
) -> tuple[str, str | None]:
    """What fits on each GPU, in words, and what is wrong with it.

    Args:
        config: the model's config.json.
        weights: bytes of all weights in memory.
        whole, free: bytes of a GPU, and of them free.
        share: part of a GPU that vLLM may take.
        count: GPUs that share the model.
        bits: of keys and values.
    """
    _, heads, width = _heads(config)
    token = 2 * int(config.get("num_hidden_layers", 0)) * max(heads // count, 1) * width * bits // 8
    own, allowed = weights // count, int(share * whole)
    left = allowed - own
    text = (
        f"memory: {human_bytes(own)} of weights of {human_bytes(allowed)} on each GPU; at most "
        f"{max(left, 0) // token if token else 0:,} tokens of keys and values in "
        f"{'bf16' if bits == FLOAT_BITS else f'{bits} bits'}, less what a step needs"
    )
    if allowed > free:
        used = human_bytes(whole - free)
        return text, f"vLLM would take {human_bytes(allowed)}, and {used} are in use; lower --gpu-memory-utilization"
    if left <= 0:
        return (
            text,
            f"the weights do not fit: {human_bytes(own)} of {human_bytes(allowed)}; more GPUs, or a larger share",
        )
    return text, None


def _weight_bytes(place: Path, checkpoint: Checkpoint | None) -> int:
    """Bytes in memory: weight-only layers are decoded to 16 bits by the plugin."""
    if checkpoint is None:
        return sum(path.stat().st_size for path in place.glob("*.safetensors"))
    total = int(count_bits(place)["bytes"])
    for name, spec in checkpoint.quantization.layers.items():
        if isinstance(spec, LinearSpec) and spec.input.kind == "float":
            entry = checkpoint.entries.get(f"{name}.weight_codes")
            total += 2 * spec.outputs * spec.input.width - (entry.size if entry else 0)
    return total


def _show_kernels(output: Output, shown: tuple[str, ...]) -> None:
    """Which backend each of the main ops runs on here."""
    for choice in ops.explain():
        if choice.op in shown:
            output.show(f"kernel {choice.op}: {choice.backend} ({choice.reason})")


def _executable() -> str:
    """vLLM's command beside this Python, else the one on the path."""
    beside = Path(sys.executable).with_name("vllm")
    return str(beside) if beside.is_file() else shutil.which("vllm") or "vllm"
