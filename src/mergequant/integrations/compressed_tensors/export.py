"""`export`: a checkpoint of ours becomes one that an unmodified vLLM, or transformers, loads as compressed-tensors."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergequant.checkpoint import Checkpoint, open_checkpoint
from mergequant.checkpoint.files import FolderLock, disk_errors, sync_folder, write_bytes, write_json
from mergequant.checkpoint.format import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from mergequant.checkpoint.tensorfile import Entry, write_tensors
from mergequant.errors import CheckpointError, UsageError
from mergequant.integrations.compressed_tensors.config import quantization_config
from mergequant.integrations.compressed_tensors.layers import Inexpressible, Scheme, convert_linear, convert_norm
from mergequant.integrations.compressed_tensors.outline import Outline, outline
from mergequant.nn import LinearSpec, NormSpec

__all__ = ["FORMATS", "Exported", "export"]

FORMATS = ("compressed-tensors",)
LARGEST_SHARD = 2 << 30  # bytes
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MARLIN_GROUPS = (0, 32, 64, 128)  # of the kernels that vLLM 0.26 has for weight-only layers; 0 = rows
SHOWN = 3  # layers named for a reason
HINT = (
    "Quantize anew with a recipe that leaves nothing online, for example `--recipe mergequant`, or `--recipe "
    "mergequant-w4a8 --set stagger=false --set other=dynamic --set prefix=none`; smoothquant, gptq and awq go, too. Or "
    "serve the checkpoint itself: vLLM does with this project's plugin"
)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        out: the folder.
        schemes: number of linear layers by what the engine is told of them.
        size: bytes of the safetensors files.
        differences: what does not give the same bits as the checkpoint, in words with its extent; empty if nothing.
    """

    out: Path
    schemes: dict[str, int]
    size: int
    differences: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "out": str(self.out), "differences": list(self.differences)}


@dataclass
class _Account:
    """What layers lose on their way, and which cannot go."""

    schemes: dict[str, Scheme] = field(default_factory=dict)
    reasons: dict[str, list[str]] = field(default_factory=dict)
    wider: Counter[tuple[str, int]] = field(default_factory=Counter)
    clipped: list[float] = field(default_factory=list)
    gain_error: float = 0.0
    scale_error: float = 0.0

    def refuse(self, name: str, reason: str) -> None:
        self.reasons.setdefault(reason, []).append(name)

    def raise_reasons(self, folder: Path) -> None:
        if not self.reasons:
            return
        listed = "; ".join(
            f"{reason} ({', '.join(names[:SHOWN])}{f' and {len(names) - SHOWN} more' if len(names) > SHOWN else ''})"
            for reason, names in self.reasons.items()
        )
        raise UsageError(f"{folder} cannot be expressed as compressed-tensors: {listed}. {HINT}")

    def differences(self, dtype: torch.dtype) -> tuple[str, ...]:
        """In words."""
        found = []
        for (inputs, bits), count in sorted(self.wider.items()):
            grid = f"-{1 << bits - 1}..{(1 << bits - 1) - 1}"
            how = "become codes of 8 bits, -128..127" if inputs == "token" else "are clamped to -128..127 instead"
            found.append(f"inputs of {count} layers, codes of {bits} bits ({grid}), {how}")
        if self.clipped:
            found.append(
                f"inputs of {len(self.clipped)} layers lose their clip ratio per token (least {min(self.clipped):.3g})"
            )
        name = str(dtype).removeprefix("torch.")
        if self.gain_error:
            found.append(f"norm gains are stored in {name}, moved by up to {self.gain_error:.2%}")
        if self.scale_error:
            found.append(f"weight-only scales are stored in {name}, moved by up to {self.scale_error:.2%}")
        odd = sorted({scheme.group_size for scheme in self.schemes.values()} - set(MARLIN_GROUPS))
        if odd:
            found.append(f"groups of {odd[0]} columns: Marlin and Machete serve rows and groups of 32, 64 or 128 only")
        return tuple(found)


def export(
    folder: Path | str, out: Path | str, *, format: str = "compressed-tensors", dtype: torch.dtype | None = None
) -> Exported:
    """Write a checkpoint in the layout of another engine.

    Integers are kept as they are: int8 weights with one scale per row and int8 inputs, or packed weights with a scale
    per row or group. `out` appears whole or not at all.

    Args:
        folder: what `mergequant quantize` wrote.
        out: folder to write; must not exist, or be empty.
        format: "compressed-tensors".
        dtype: of everything that is not quantized, and so of the engine; None takes the config's.

    Raises:
        UsageError: a layer that the format cannot express, with the reason; an unknown format; `out` is not empty.
        CheckpointError: the checkpoint breaks a rule of its format, or the disk refuses.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}; known are {', '.join(FORMATS)}")
    folder, out = Path(folder), Path(os.path.abspath(out))
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} exists and is not empty; it is left alone, choose another --out")
    if not out.parent.is_dir():
        raise CheckpointError(f"{out}: its parent folder does not exist; create it or choose another --out")
    checkpoint = open_checkpoint(folder)
    checkpoint.validate()
    used = dtype or DTYPES.get(str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")))
    used = used or torch.bfloat16
    shape, account = outline(checkpoint), _Account()
    partial = out.with_name(out.name + ".exporting")
    lock = FolderLock(partial)
    lock.acquire()
    try:
        final = partial / "final"
        with disk_errors(out):
            shutil.rmtree(final, ignore_errors=True)
            final.mkdir()
            size = _write_shards(final, _units(checkpoint, shape, used, account))
            account.raise_reasons(folder)
            _write_rest(final, checkpoint, shape, used, account)
            sync_folder(final)
            os.rename(final, out)
            sync_folder(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        lock.release()
    counts = Counter(_in_words(scheme) for scheme in account.schemes.values())
    return Exported(out, dict(sorted(counts.items())), size, account.differences(used))


def _units(
    checkpoint: Checkpoint, shape: Outline, dtype: torch.dtype, account: _Account
) -> Iterator[dict[str, Tensor | Entry]]:
    """Tensors of one layer after the other, then the rest; nothing more once a layer was refused."""
    layers = checkpoint.quantization.layers
    owned: set[str] = set()
    if checkpoint.prefix_module is not None:
        account.refuse(checkpoint.prefix_module, "a stored prefix, which other engines cannot put into their caches")
    for name, spec in layers.items():
        prefix = f"{name}."
        tensors = {key.removeprefix(prefix): value for key, value in checkpoint.tensors(prefix).items()}
        owned.update(prefix + key for key in tensors)
        try:
            if isinstance(spec, NormSpec):
                stored = _norm(name, spec, tensors, shape, dtype, account)
            else:
                stored = _linear(name, spec, tensors, checkpoint, shape, dtype, account)
        except Inexpressible as reason:
            account.refuse(name, str(reason))
        if not account.reasons:
            yield {prefix + key: value for key, value in stored.items()}
    if account.reasons:
        return
    for name, entry in checkpoint.entries.items():
        if name in owned or name.startswith(f"{checkpoint.kv_module}."):
            continue
        cast = entry.dtype.is_floating_point and entry.dtype != dtype
        yield {name: checkpoint.get(name).to(dtype) if cast else entry}


def _norm(
    name: str, spec: NormSpec, tensors: dict[str, Tensor], shape: Outline, dtype: torch.dtype, account: _Account
) -> dict[str, Tensor]:
    gain, bias = convert_norm(spec, tensors, f"{name}.bias" in shape.shapes)
    offset = float(shape.norms[name].unit_offset)
    weight = (gain - offset).to(dtype)
    applied = weight.float() + offset
    account.gain_error = max(account.gain_error, _largest_change(applied, gain))
    return {"weight": weight, **({} if bias is None else {"bias": bias.to(dtype)})}


def _linear(
    name: str,
    spec: LinearSpec,
    tensors: dict[str, Tensor],
    checkpoint: Checkpoint,
    shape: Outline,
    dtype: torch.dtype,
    account: _Account,
) -> dict[str, Tensor]:
    index = None
    if spec.input.kind == "codes":
        norm = shape.reads.get(name)
        found = None if norm is None else checkpoint.quantization.layers[norm]
        if not isinstance(found, NormSpec) or (found.width, found.bits) != (spec.input.width, spec.input.bits):
            raise CheckpointError(f"{name}: reads codes, and no norm that emits them is in front of it; write it again")
        index = checkpoint.get(f"{norm}.index") if found.gathers else None
    scheme, stored = convert_linear(
        spec, tensors, dtype, shape.shapes[f"{name}.weight"][1], index, f"{name}.bias" in shape.shapes
    )
    account.schemes[name] = scheme
    if scheme.inputs == "float":
        exact = tensors["weight_scale"].reshape(spec.outputs, -1)
        account.scale_error = max(account.scale_error, _largest_change(stored["weight_scale"].float(), exact))
        return stored
    if spec.input.bits < 8:
        account.wider[scheme.inputs, spec.input.bits] += 1
    if scheme.inputs == "token" and spec.input.clip_ratio < 1:
        account.clipped.append(spec.input.clip_ratio)
    return stored


def _largest_change(stored: Tensor, exact: Tensor) -> float:
    """Largest relative change of a value that is not 0."""
    there = exact != 0
    return float(((stored - exact).abs()[there] / exact.abs()[there]).max()) if bool(there.any()) else 0.0


def _write_shards(folder: Path, units: Iterator[dict[str, Tensor | Entry]]) -> int:
    """Write tensors in shards of up to `LARGEST_SHARD`, with an index if there are several; bytes written."""
    shards: list[dict[str, tuple[int, ...]]] = []
    total, room, held = 0, LARGEST_SHARD, dict[str, Tensor | Entry]()

    def flush() -> None:
        nonlocal total
        size, _ = write_tensors(folder / f"shard-{len(shards)}", held)
        shards.append({name: tuple(tensor.shape) for name, tensor in held.items()})
        total += size
        held.clear()

    data = 0
    for unit in units:
        size = sum(t.size if isinstance(t, Entry) else t.numel() * t.element_size() for t in unit.values())
        if held and size > room:
            flush()
            room = LARGEST_SHARD
        held.update(unit)
        room -= size
        data += size
    flush()
    if len(shards) == 1:
        os.rename(folder / "shard-0", folder / SINGLE_NAME)
        return total
    places = {}
    for number, names in enumerate(shards):
        final = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(folder / f"shard-{number}", folder / final)
        places.update(dict.fromkeys(names, final))
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": data}, "weight_map": places})
    return total


def _write_rest(folder: Path, checkpoint: Checkpoint, shape: Outline, dtype: torch.dtype, account: _Account) -> None:
    """Tokenizer and other files as they are, a card, and the config last."""
    for path in sorted(checkpoint.folder.iterdir()):
        skipped = path.suffix == ".safetensors" or path.name in (CONFIG_NAME, INDEX_NAME, "README.md")
        if path.is_file() and not skipped:
            write_bytes(folder / path.name, path.read_bytes())
    recipe = checkpoint.quantization.recipe.get("name", "unknown")
    lines = [
        f"# {checkpoint.folder.name}, as compressed-tensors\n",
        f"Made by `mergequant export` from a checkpoint of recipe `{recipe}`. vLLM serves it without a plugin:\n",
        "    vllm serve DIR\n",
        "Integers of weights are those of the checkpoint. What gives other bits:\n",
        *(f"- {text}" for text in account.differences(dtype) or ("nothing but the order of float additions",)),
    ]
    write_bytes(folder / "README.md", ("\n".join(lines) + "\n").encode())
    config: dict[str, Any] = json.loads(json.dumps(checkpoint.config))
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    ignore = [name for name in shape.linears if name not in account.schemes]
    config["quantization_config"] = quantization_config(account.schemes, ignore)
    write_json(folder / CONFIG_NAME, config)


def _in_words(scheme: Scheme) -> str:
    if scheme.inputs == "float":
        return (
            f"W{scheme.weight_bits}A16, "
            + (f"groups of {scheme.group_size}" if scheme.group_size else "rows")
            + (", zero points" if scheme.zeros else "")
        )
    return "W8A8, " + ("static step" if scheme.inputs == "tensor" else "scale per token")
