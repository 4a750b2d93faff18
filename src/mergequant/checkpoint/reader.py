"""Checkpoint: a checkpoint folder, opened lazily and checked against every rule of `docs/format.md`."""

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mergequant.checkpoint.files import read_json
from mergequant.checkpoint.format import (
    CONFIG_NAME,
    INDEX_NAME,
    KV_MODULE,
    PREFIX_MODULE,
    SHARD_PATTERN,
    SINGLE_NAME,
    Quantization,
    expected_tensors,
    gather_limits,
)
from mergequant.checkpoint.tensorfile import Entry, TensorFile, read_header
from mergequant.errors import CheckpointError
from mergequant.grids.outliers import column_numbers
from mergequant.grids.two_level import LARGEST_STEP
from mergequant.nn import LinearSpec, NormSpec, Spec

__all__ = ["Checkpoint", "open_checkpoint"]

ADVICE = "fetch or write the checkpoint again"
SHOWN = 4  # names listed in a message
GROUP_BOUNDS = {".group_scale": (1, LARGEST_STEP), ".group_zero": (-8, 7)}  # of two-level weights
CODES_NAME = re.compile(r"\.weight_codes$|\.indices_\d+$")  # any value is valid
POINTERS, COLUMNS = ".outliers.pointers", ".outliers.columns"
SCALE_NAME = re.compile(r"\.weight_scale$|\.(key|value)_scale_\d$")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose config is parsed; headers and tensors are read when they are asked for.

    Attributes:
        folder: where it lies.
        config: config.json as it is.
        quantization: its `quantization_config`, parsed.
    """

    folder: Path
    config: dict[str, Any]
    quantization: Quantization

    @cached_property
    def files(self) -> list[TensorFile]:
        """Headers of all shards.

        Raises:
            CheckpointError: a shard that is missing, misnamed, corrupt, or disagrees with the index.
        """
        index, single = self.folder / INDEX_NAME, self.folder / SINGLE_NAME
        if index.exists() and single.exists():
            raise CheckpointError(
                f"{self.folder}: has both {INDEX_NAME} and {SINGLE_NAME}; remove the one that is stale"
            )
        if not index.exists():
            return [read_header(single)]
        places = _weight_map(index)
        headers = {name: read_header(self.folder / name) for name in sorted(set(places.values()))}
        for shard, header in headers.items():
            for name in header.entries:
                if places.get(name) != shard:
                    where = f"to lie in {places[name]}" if name in places else "nowhere"
                    raise CheckpointError(
                        f"{header.path}: holds tensor {name!r}, which the index says {where}; {ADVICE}"
                    )
        for name, shard in places.items():
            if name not in headers[shard].entries:
                raise CheckpointError(
                    f"{headers[shard].path}: lacks tensor {name!r}, which the index promises; {ADVICE}"
                )
        return list(headers.values())

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """Place, dtype and shape of every tensor, by its full name."""
        return {name: entry for file in self.files for name, entry in file.entries.items()}

    @cached_property
    def prefix_module(self) -> str | None:
        """Full name of the module that holds the prefix's tensors, None without a prefix.

        Raises:
            CheckpointError: the prefix is described and not stored, stored and not described, or stored twice.
        """
        return self._place_of(PREFIX_MODULE, self.quantization.prefix, "prefix")

    @cached_property
    def kv_module(self) -> str | None:
        """Full name of the module that holds the steps of a quantized cache, None without them.

        Raises:
            CheckpointError: they are described and not stored, stored and not described, stored twice, stored elsewhere
                than the prefix, or made for other keys and values than the prefix's.
        """
        kv, prefix = self.quantization.kv, self.quantization.prefix
        place = self._place_of(KV_MODULE, kv, "set of cache steps")
        if place is None or kv is None or prefix is None or self.prefix_module is None:
            return place
        shapes = [(spec.layers, spec.kv_heads, spec.key_width, spec.value_width) for spec in (kv, prefix)]
        if shapes[0] != shapes[1]:
            raise CheckpointError(
                f"{place}: steps for keys and values of shape {shapes[0]} (layers, heads, widths), the prefix has "
                f"{shapes[1]}; {ADVICE}"
            )
        if place.rpartition(".")[0] != self.prefix_module.rpartition(".")[0]:
            raise CheckpointError(f"{place}: lies in another module than {self.prefix_module}; {ADVICE}")
        return place

    def _place_of(self, module: str, spec: Spec | None, what: str) -> str | None:
        """Full name of the one module of this name, if it is described; None if it is neither described nor stored."""
        found = sorted({parent for name in self.entries if (parent := _parent_named(name, module))})
        if spec is None and not found:
            return None
        if spec is None or len(found) != 1:
            described = "no" if spec is None else "one"
            raise CheckpointError(
                f"{self.folder}: the config describes {described} {what}, stored are {found}; {ADVICE}"
            )
        return found[0]

    def names(self) -> list[str]:
        """Full names of all tensors, sorted."""
        return sorted(self.entries)

    def get(self, name: str) -> Tensor:
        """One tensor, on the CPU.

        Raises:
            CheckpointError: there is none of this name.
        """
        if name not in self.entries:
            raise CheckpointError(f"{self.folder}: has no tensor {name!r}; {ADVICE}")
        with safe_open(self.entries[name].path, framework="pt") as file:
            return file.get_tensor(name)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """All tensors whose full name starts with `prefix`, by full name."""
        out = {}
        for header in self.files:
            wanted = [name for name in header.entries if name.startswith(prefix)]
            if wanted:
                with safe_open(header.path, framework="pt") as file:
                    out.update({name: file.get_tensor(name) for name in wanted})
        return out

    def validate(self) -> None:
        """Check every rule of the format that can be checked without the float model; codes are not read.

        Raises:
            CheckpointError: naming layer and tensor, what is wrong, and what to do.
        """
        quantization = self.quantization
        expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, spec in quantization.layers.items():
            expected.update(expected_tensors(name, spec))
        roots = set(quantization.layers)
        for module, own in ((self.prefix_module, quantization.prefix), (self.kv_module, quantization.kv)):
            if module is not None and own is not None:
                expected.update(expected_tensors(module, own))
                roots.add(module)
        for name in self.entries:
            if name not in expected and (owner := _owner(name, roots)):
                raise CheckpointError(f"{owner}: tensor {name!r} is not part of its description; {ADVICE}")
        if missing := sorted(set(expected) - set(self.entries)):
            more = "" if len(missing) <= SHOWN else f" and {len(missing) - SHOWN} more"
            raise CheckpointError(f"{self.folder}: missing tensors {', '.join(missing[:SHOWN])}{more}; {ADVICE}")
        for name, (dtype, shape) in expected.items():
            entry = self.entries[name]
            if (entry.dtype, entry.shape) != (dtype, shape):
                raise CheckpointError(
                    f"{name}: is {entry.dtype} {entry.shape}, its description needs {dtype} {shape}; {ADVICE}"
                )
        self._check_chain()
        self._check_values(expected)

    def _check_chain(self) -> None:
        norms = {name: spec for name, spec in self.quantization.layers.items() if isinstance(spec, NormSpec)}
        for name, spec in self.quantization.layers.items():
            if not isinstance(spec, LinearSpec) or spec.input.kind != "codes":
                continue
            near = [norm for key, norm in norms.items() if name.startswith(key.rpartition(".")[0] + ".")]
            if not any(
                (norm.width, norm.bits) == (spec.input.width, spec.input.bits) for norm in near or norms.values()
            ):
                raise CheckpointError(
                    f"{name}: reads {spec.input.width} codes of {spec.input.bits} bits, which no norm before it emits; "
                    f"{ADVICE}"
                )

    def _check_values(self, expected: dict[str, Any]) -> None:
        limits: dict[str, int] = {}
        for name, spec in self.quantization.layers.items():
            limits.update(gather_limits(name, spec))
        for header in self.files:
            small = [name for name in header.entries if name in expected and not CODES_NAME.search(name)]
            with safe_open(header.path, framework="pt") as file:
                for name in small:
                    value = file.get_tensor(name)
                    _check_value(name, value, limits.get(name))
                    if name.endswith(POINTERS):
                        _check_pointers(name, value, expected[name.removesuffix(POINTERS) + COLUMNS][1][0])


def open_checkpoint(folder: Path | str) -> Checkpoint:
    """Open a checkpoint folder; only config.json is read here.

    Raises:
        VersionError: an unknown major version of the format.
        CheckpointError: the folder or its config is missing, unreadable, or not ours.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder; pass the folder that `mergequant quantize` wrote")
    config = read_json(folder / CONFIG_NAME)
    if not isinstance(config, dict) or "quantization_config" not in config:
        raise CheckpointError(
            f"{folder}: {CONFIG_NAME} has no quantization_config: this is no quantized checkpoint; load a float model "
            "with transformers' AutoModelForCausalLM, or make a checkpoint with `mergequant quantize`"
        )
    return Checkpoint(folder, config, Quantization.from_dict(config["quantization_config"]))


def _weight_map(index: Path) -> dict[str, str]:
    data = read_json(index)
    places = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{index}: has no weight_map; {ADVICE}")
    for name, shard in places.items():
        if not isinstance(shard, str) or not SHARD_PATTERN.fullmatch(shard):
            raise CheckpointError(
                f"{index}: places tensor {name!r} in {shard!r}, which is no plain .safetensors file name inside the "
                "folder; do not trust this checkpoint"
            )
    return places


def _check_value(name: str, value: Tensor, limit: int | None) -> None:
    if limit is not None:
        value = column_numbers(value) if value.dtype == torch.int16 else value
        low, high = int(value.min()), int(value.max())
        if low < 0 or high >= limit:
            raise CheckpointError(
                f"{name}: gather index reaches {low}..{high}, outside the channels 0..{limit - 1}; {ADVICE}"
            )
        if name.endswith(".order") and value.unique().numel() < limit:
            raise CheckpointError(f"{name}: names a column twice and leaves out another; {ADVICE}")
        return
    bounds = next((known for end, known in GROUP_BOUNDS.items() if name.endswith(end)), None)
    if bounds is not None and not bounds[0] <= int(value.min()) <= int(value.max()) <= bounds[1]:
        raise CheckpointError(
            f"{name}: reaches {int(value.min())}..{int(value.max())}, outside {bounds[0]}..{bounds[1]}; {ADVICE}"
        )
    finite = torch.isfinite(value)
    if not finite.all():
        place = tuple((~finite).nonzero()[0].tolist())
        raise CheckpointError(f"{name}: is not finite at {place}; {ADVICE}")
    if SCALE_NAME.search(name) and not (value > 0).all():
        place = tuple((value <= 0).nonzero()[0].tolist())
        raise CheckpointError(f"{name}: scale at {place} is not positive; {ADVICE}")


def _check_pointers(name: str, pointers: Tensor, count: int) -> None:
    ends = int(pointers[0]), int(pointers[-1])
    if ends != (0, count) or bool((pointers.diff() < 0).any()):
        raise CheckpointError(
            f"{name}: rows of outliers must begin at 0, never fall and end at {count}, not {ends[0]}..{ends[1]}; "
            f"{ADVICE}"
        )


def _parent_named(name: str, module: str) -> str | None:
    """The part of a tensor's name up to a module of this name, None if it has none."""
    parts = name.split(".")
    return ".".join(parts[: parts.index(module) + 1]) if module in parts[:-1] else None


def _owner(name: str, roots: set[str]) -> str | None:
    parts = name.split(".")
    return next((owner for end in range(1, len(parts)) if (owner := ".".join(parts[:end])) in roots), None)
