"""Exported checkpoints: loaded by the library itself, equal integers, and a refusal for what cannot be expressed."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import mergequant
from families import make_model
from mergequant.checkpoint import open_checkpoint
from mergequant.errors import UsageError
from mergequant.integrations.compressed_tensors import export
from mergequant.integrations.compressed_tensors.layers import Scheme, pack_words
from mergequant.nn import LinearSpec, NormSpec, build_module

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
STATIC = {"tile": 8, "stagger": False, "other": "static", "prefix": "none", "allow_no_prefix": True}
DYNAMIC = {"tile": 8, "stagger": False, "other": "dynamic", "prefix": "none"}
EXPRESSIBLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "split, fully static": ("llama", "mergequant-w4a8", STATIC),
    "layer norms with biases": ("opt", "mergequant-w4a8", STATIC),
    "weight-only rows": ("qwen3", "rtn", {"activation_bits": 16}),
    "weight-only groups, 3 bits, zeros": ("llama", "gptq", {"weight_bits": 3, "group_size": 4}),
}
pytest.importorskip("compressed_tensors", reason="the extra `dev` has it")


@pytest.fixture(scope="module")
def stock() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS / "vllm")
        return importlib.import_module("stock")


def tokens(count: int = 6, length: int = 24, seed: int = 7) -> Tensor:
    ids = torch.randint(3, 97, (count, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 1
    return ids


@pytest.fixture
def quantized(tmp_path: Path) -> Callable[..., tuple[Path, PreTrainedModel]]:
    """quantized(family, recipe, **settings): folder of a checkpoint, and the float model."""

    def make(family: str, recipe: str, **settings: Any) -> tuple[Path, PreTrainedModel]:
        model = make_model(family)
        out = tmp_path / "checkpoint"
        mergequant.quantize(model, recipe, settings=settings, data=tokens(), samples=4, seqlen=24, out=out)
        return out, model

    return make


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(tokens(3, 17, 1)).logits
    return result


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("label", EXPRESSIBLE)
def test_library_gives_outputs_of_checkpoint(
    label: str, quantized: Callable[..., Any], tmp_path: Path, stock: ModuleType
) -> None:
    family, recipe, settings = EXPRESSIBLE[label]
    folder, _ = quantized(family, recipe, **settings)
    made = export(folder, tmp_path / "out")
    assert sum(made.schemes.values()) == sum(
        isinstance(spec, LinearSpec) for spec in open_checkpoint(folder).quantization.layers.values()
    )
    ours = logits(mergequant.load(folder))
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    tolerance = 0 if "weight-only" in label else 1e-6  # static steps: the order of float multiplications
    assert distance(logits(theirs), ours) <= tolerance
    assert distance(logits(stock.stock_model(tmp_path / "out")), ours) <= max(tolerance, 1e-7)


def test_dynamic_inputs_of_8_bits_give_what_the_engine_computes(
    quantized: Callable[..., Any], tmp_path: Path, stock: ModuleType
) -> None:
    folder, _ = quantized("llama", "rtn", weight_bits=8, activation_bits=8)
    made = export(folder, tmp_path / "out")
    assert made.differences == ()
    assert distance(logits(stock.stock_model(tmp_path / "out")), logits(mergequant.load(folder))) < 1e-6


def test_copies_of_a_channel_are_one_column(quantized: Callable[..., Any], tmp_path: Path) -> None:
    folder, _ = quantized("llama", "mergequant-w4a8", **DYNAMIC)
    export(folder, tmp_path / "out")
    checkpoint = open_checkpoint(folder)
    norm = "model.layers.0.input_layernorm"
    spec = checkpoint.quantization.layers[norm]
    assert isinstance(spec, NormSpec)
    assert spec.width > spec.channels
    stored = load_file(tmp_path / "out" / "model.safetensors")
    layer = build_module(checkpoint.quantization.layers["model.layers.0.self_attn.q_proj"])
    name = "model.layers.0.self_attn.q_proj"
    layer.load_state_dict({k.removeprefix(f"{name}."): v for k, v in checkpoint.tensors(f"{name}.").items()})
    codes = torch.randint(-128, 128, (5, spec.channels), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    index = checkpoint.get(f"{norm}.index").long()
    wanted = codes[:, index] @ layer.integer_weight().T.to(torch.int32)
    assert torch.equal(codes @ stored[f"{name}.weight"].T.to(torch.int32), wanted)


def test_narrow_codes_are_said_to_be_clamped_elsewhere(
    quantized: Callable[..., Any], tmp_path: Path, stock: ModuleType
) -> None:
    folder, model = quantized("llama", "mergequant")
    made = export(folder, tmp_path / "out", dtype=torch.bfloat16)
    text = "; ".join(made.differences)
    for words in ("10 layers, codes of 4 bits (-8..7), are clamped to -128..127", "clip ratio", "bfloat16, moved"):
        assert words in text
    assert all(line in (tmp_path / "out" / "README.md").read_text(encoding="utf-8") for line in made.differences)
    # Nothing is lost by a wider clamp: what is beyond 7 is no longer cut off.
    exact, ours = logits(model), logits(mergequant.load(folder))
    assert distance(logits(stock.stock_model(tmp_path / "out", torch.float32)), exact) < 1.05 * distance(ours, exact)


@pytest.mark.parametrize(
    ("recipe", "settings", "reasons"),
    [
        ("mergequant-w4a8", {"tile": 8}, ("a stored prefix", "staggered", "an online rotation", "stagger=false")),
        ("outliertune", {}, ("the norm adds a bias", "a bias that this architecture's layer does not have")),
        ("qllm", {"expansion": 0.2, "correction": "none", "distance": "sums"}, ("summed at run time",)),
    ],
)
def test_what_cannot_be_expressed_is_refused_and_leaves_nothing(
    recipe: str, settings: dict[str, Any], reasons: tuple[str, ...], quantized: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = quantized("llama", recipe, **settings)
    with pytest.raises(UsageError) as raised:
        export(folder, tmp_path / "out")
    assert all(reason in str(raised.value) for reason in reasons)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_config_is_read_by_the_library_and_shards_by_their_index(
    quantized: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    monkeypatch.setattr(importlib.import_module(export.__module__), "LARGEST_SHARD", 20_000)
    folder, _ = quantized("llama", "rtn", weight_bits=8, activation_bits=8)
    export(folder, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    parsed = QuantizationConfig.model_validate(config["quantization_config"])
    group = parsed.config_groups["group_0"]
    assert (group.weights.num_bits, group.weights.strategy, group.input_activations.dynamic) == (8, "channel", True)
    assert parsed.ignore == ["lm_head"]
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert logits(theirs).isfinite().all()


def test_export_when_target_is_taken_or_format_unknown_is_refused(
    quantized: Callable[..., Any], tmp_path: Path
) -> None:
    folder, _ = quantized("llama", "rtn", activation_bits=16)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UsageError, match="not empty"):
        export(folder, tmp_path / "out")
    with pytest.raises(UsageError, match="unknown format"):
        export(folder, tmp_path / "other", format="gguf")


@pytest.mark.parametrize(("bits", "width"), [(4, 24), (4, 13), (8, 7)])
def test_words_are_those_of_the_library(bits: int, width: int, stock: ModuleType) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (5, width), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    packed = pack_words(codes, bits)
    theirs = pack_to_int32(codes, bits)
    assert torch.equal(stock.unpack_words(packed, bits, width), codes.long())
    assert torch.equal(stock.unpack_words(theirs, bits, width), codes.long())
    if not width % (32 // bits):
        assert torch.equal(packed, theirs)


def test_schemes_are_ordered_so_that_groups_keep_their_numbers() -> None:
    assert sorted({Scheme("token"), Scheme("float", 4, 32), Scheme("tensor")})[0].inputs == "float"
