"""The format contract in code (`docs/format.md` in words): the config's keys, and the tensors of a layer."""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from mergequant.errors import CheckpointError, VersionError
from mergequant.nn import (
    CodebookSpec,
    InputSpec,
    KVScales,
    KVSpec,
    LinearSpec,
    NormSpec,
    PrefixSpec,
    PrefixStore,
    SparseSpec,
    Spec,
    build_module,
    spec_from_dict,
)

__all__ = [
    "CONFIG_NAME",
    "FORMAT_VERSION",
    "INDEX_NAME",
    "KV_MODULE",
    "PREFIX_MODULE",
    "QUANT_METHOD",
    "SHARD_PATTERN",
    "SINGLE_NAME",
    "Quantization",
    "expected_tensors",
    "gather_limits",
]

QUANT_METHOD = "mergequant"
# 1.1 added steps of a quantized cache, 1.2 kinds of norms and inputs, 1.3 weight-only kinds, 1.4 rotated keys
FORMAT_VERSION = "1.4"
CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PREFIX_MODULE = "mergequant_prefix"
KV_MODULE = "mergequant_kv"
SHARD_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")  # a plain file name: no folder, no drive
VERSION_PATTERN = re.compile(r"(\d{1,4})\.(\d{1,4})")
ADVICE = "fetch or write the checkpoint again"


@dataclass(frozen=True)
class Quantization:
    """The parsed `quantization_config`.

    Attributes:
        recipe: the recipe, whole.
        layers: description of every quantized module, by its full name.
        provenance: where the checkpoint came from: fingerprint, data, seeds, versions.
        figures: what was measured while it was made.
        prefix: description of the stored prefix, None without one.
        kv: description of the stored steps of a quantized cache, None without them.
        format_version: as written.
    """

    recipe: dict[str, Any]
    layers: dict[str, LinearSpec | NormSpec]
    provenance: dict[str, Any]
    figures: dict[str, Any]
    prefix: PrefixSpec | None = None
    kv: KVSpec | None = None
    format_version: str = FORMAT_VERSION

    @classmethod
    def from_dict(cls, data: Any) -> "Quantization":
        """Parse strictly.

        Raises:
            VersionError: an unknown major version.
            CheckpointError: another method's config, or a key that is missing, unknown or of the wrong kind.
        """
        where = "quantization_config"
        if not isinstance(data, dict):
            raise CheckpointError(f"{where}: expected an object, found {type(data).__name__}; {ADVICE}")
        if data.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(
                f"{where}.quant_method is {data.get('quant_method')!r}, not {QUANT_METHOD!r}: this checkpoint was made "
                "by another tool; load it with transformers' AutoModelForCausalLM"
            )
        version = _known_version(data.get("format_version"))
        objects = {"recipe", "layers", "provenance", "figures"}
        if missing := sorted(objects - set(data)):
            raise CheckpointError(f"{where}: key {missing[0]!r} is missing; {ADVICE}")
        if unknown := sorted(set(data) - objects - {"quant_method", "format_version", "prefix", "kv"}):
            raise CheckpointError(
                f"{where}: unknown key {unknown[0]!r} in format version {version}; this release reads "
                f"{FORMAT_VERSION}, update mergequant if the checkpoint is newer"
            )
        for name in sorted(objects):
            if not isinstance(data[name], dict):
                raise CheckpointError(
                    f"{where}.{name}: expected an object, found {type(data[name]).__name__}; {ADVICE}"
                )
        if not data["layers"]:
            raise CheckpointError(f"{where}.layers is empty: nothing is quantized; {ADVICE}")
        layers = {name: spec_from_dict(spec, f"{where}.layers.{name}") for name, spec in data["layers"].items()}
        prefix = PrefixSpec.from_dict(data["prefix"], f"{where}.prefix") if "prefix" in data else None
        kv = KVSpec.from_dict(data["kv"], f"{where}.kv") if "kv" in data else None
        return cls(data["recipe"], layers, data["provenance"], data["figures"], prefix, kv, version)

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready `quantization_config`."""
        out: dict[str, Any] = {
            "quant_method": QUANT_METHOD,
            "format_version": self.format_version,
            "recipe": self.recipe,
            "layers": {name: spec.to_dict() for name, spec in self.layers.items()},
            "provenance": self.provenance,
            "figures": self.figures,
        }
        if self.prefix is not None:
            out["prefix"] = self.prefix.to_dict()
        if self.kv is not None:
            out["kv"] = self.kv.to_dict()
        return out


def expected_tensors(name: str, spec: Spec) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of every tensor of a layer, prefix or set of cache steps named `name`, by full tensor name.

    Raises:
        CheckpointError: naming the layer, where this release cannot build it.
    """
    try:
        tensors = _tensors(spec)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error
    return {f"{name}.{key}": value for key, value in tensors.items()}


def gather_limits(name: str, spec: LinearSpec | NormSpec) -> dict[str, int]:
    """Full names of what points at channels (gather index, order, columns of outliers), with the number of these."""
    if isinstance(spec, NormSpec):
        return {f"{name}.index": spec.channels} if spec.gathers else {}
    if isinstance(spec, (CodebookSpec, SparseSpec)):
        order = {f"{name}.order": spec.input.width} if spec.ordered else {}
        return {**order, f"{name}.outliers.columns": spec.input.width} if spec.outliers else order
    source: InputSpec = spec.input
    gathers = source.kind in ("static", "dynamic") and source.gathers
    return {f"{name}.input_quantizer.index": source.in_width} if gathers else {}


@lru_cache(maxsize=4096)
def _tensors(spec: Spec) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    # The modules themselves are the only definition of what is stored; on the meta device they cost nothing.
    with torch.device("meta"):
        module: nn.Module
        if isinstance(spec, PrefixSpec):
            module = PrefixStore(spec)
        elif isinstance(spec, KVSpec):
            module = KVScales(spec)
        else:
            module = build_module(spec)  # type: ignore[arg-type]
    return {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in module.state_dict().items()}


def _known_version(version: Any) -> str:
    match = VERSION_PATTERN.fullmatch(version) if isinstance(version, str) else None
    if match is None:
        raise CheckpointError(f"quantization_config.format_version is {version!r}, not MAJOR.MINOR; {ADVICE}")
    if match[1] != FORMAT_VERSION.split(".", maxsplit=1)[0]:
        raise VersionError(
            f"the checkpoint has format version {version}, this release reads {FORMAT_VERSION}; "
            "install the release of mergequant that wrote it, or quantize again"
        )
    return version
