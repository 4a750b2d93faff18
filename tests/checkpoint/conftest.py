"""A small checkpoint without any model: two blocks of a norm and linears, with every kind of tensor."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergequant import ops
from mergequant.checkpoint import CheckpointWriter
from mergequant.nn import (
    CodebookSpec,
    InputSpec,
    KVScales,
    KVSpec,
    LinearSpec,
    NormSpec,
    PartSpec,
    PrefixSpec,
    PrefixStore,
    SparseSpec,
    Spec,
    build_module,
)

WIDTH = 12
PREFIX = PrefixSpec(tokens=(1, 4), replaces_bos=True, layers=2, kv_heads=2, key_width=3, value_width=3, channels=WIDTH)
KV = KVSpec(layers=2, kv_heads=2, key_width=3, value_width=3)
LAYERS: dict[str, Spec] = {
    "books": CodebookSpec(
        outputs=6,
        parts=(PartSpec(columns=4, vector=2, bits=3, residual_bits=2), PartSpec(columns=8, vector=1, bits=2, groups=8)),
        ordered=True,
        outliers=5,
        input=InputSpec(kind="float", in_width=WIDTH, width=WIDTH),
    ),
    "norm": NormSpec(norm="rms", channels=WIDTH, width=14, bits=8, eps=1e-5, gathers=True),
    "attn.q_proj": LinearSpec(outputs=10, input=InputSpec(kind="codes", in_width=WIDTH, width=14)),
    "attn.o_proj": LinearSpec(
        outputs=WIDTH,
        bias=True,
        input=InputSpec(kind="static", in_width=10, width=12, per_channel=True, gathers=True, shifts=True),
    ),
    "mlp": LinearSpec(
        outputs=6,
        weight_bits=8,
        input=InputSpec(kind="static", in_width=WIDTH, width=WIDTH, rotation=ops.rotation(WIDTH).name),
    ),
    "sparse": SparseSpec(
        outputs=6,
        weight_bits=3,
        group_size=4,
        zeros="float",
        outliers=5,
        tile=4,
        ordered=True,
        input=InputSpec(kind="float", in_width=WIDTH, width=WIDTH),
    ),
    "two": LinearSpec(outputs=6, group_size=4, levels=2, input=InputSpec(kind="dynamic", in_width=WIDTH, width=WIDTH)),
}


def _fill(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    if name.endswith(".index"):
        return torch.randint(0, 10, tensor.shape, generator=generator, dtype=torch.int32)
    if name.endswith(".order"):
        return torch.randperm(tensor.shape[0], generator=generator).to(tensor.dtype)
    if name.endswith(".outliers.columns"):
        return torch.randint(0, WIDTH, tensor.shape, generator=generator).to(tensor.dtype)
    if name.endswith(".outliers.pointers"):
        return torch.tensor([0, 0, 2, 2, 3, 3, 5], dtype=tensor.dtype)
    if name.endswith((".group_scale", ".group_zero")):
        low, high = (1, 17) if name.endswith("scale") else (-8, 8)
        return torch.randint(low, high, tensor.shape, generator=generator).to(tensor.dtype)
    if tensor.is_floating_point():
        return (torch.rand(tensor.shape, generator=generator) + 0.1).to(tensor.dtype)
    return torch.randint(0, 100, tensor.shape, generator=generator).to(tensor.dtype)


def _block(index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(index)
    tensors = {}
    for short, spec in LAYERS.items():
        for key, tensor in build_module(spec).state_dict().items():  # type: ignore[arg-type]
            name = f"model.layers.{index}.{short}.{key}"
            tensors[name] = _fill(name, tensor, generator)
    tensors[f"model.layers.{index}.kept.weight"] = torch.randn(3, 5, generator=generator).bfloat16()
    layers = {f"model.layers.{index}.{short}": spec.to_dict() for short, spec in LAYERS.items()}
    return tensors, {"layers": layers, "figures": {"loss": 0.25 * index}}


@pytest.fixture
def block() -> Callable[[int], tuple[dict[str, Tensor], dict[str, Any]]]:
    """block(index): tensors and record of a block."""
    return _block


@pytest.fixture
def config() -> dict[str, Any]:
    """The whole config.json of two blocks, a prefix and the steps of a quantized cache."""
    return {
        "model_type": "llama",
        "quantization_config": {
            "quant_method": "mergequant",
            "format_version": "1.1",
            "recipe": {"name": "by-hand"},
            "layers": {**_block(0)[1]["layers"], **_block(1)[1]["layers"]},
            "prefix": PREFIX.to_dict(),
            "kv": KV.to_dict(),
            "provenance": {"seed": 0},
            "figures": {"loss": 0.5},
        },
    }


@pytest.fixture
def tail() -> dict[str, Tensor]:
    """Embedding, prefix and the steps of a quantized cache."""
    generator = torch.Generator().manual_seed(9)
    store = {f"model.mergequant_prefix.{key}": tensor for key, tensor in PrefixStore(PREFIX).state_dict().items()}
    tensors = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in store.items()}
    steps = KVScales(KV).state_dict()
    tensors |= {f"model.mergequant_kv.{key}": _fill(key, tensor, generator) for key, tensor in steps.items()}
    return {"model.embed_tokens.weight": torch.randn(7, WIDTH, generator=generator).half(), **tensors}


@pytest.fixture
def write(config: dict[str, Any], tail: dict[str, Tensor], tmp_path: Path) -> Callable[..., Path]:
    """write(out=None, fingerprint="f", blocks=2): run a writer from wherever it stands to the end, or stop early."""

    def run(out: Path | None = None, fingerprint: str = "f", blocks: int = 2, **options: Any) -> Path:
        out = out or tmp_path / "out"
        with CheckpointWriter(out, fingerprint, **options) as writer:
            for index in range(writer.done, 0 if writer.finished else blocks):
                writer.write_block(index, *_block(index))
            if blocks == 2 and not writer.finished:
                writer.finish(tail=tail, config=config, files={"README.md": "# card", "x.bin": b"\0"})
        return out

    return run
