"""Every run stores the steps of a quantized cache, measured on the quantized blocks; or says why it cannot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaAttention

import mergequant
from families import FAMILIES, make_model
from mergequant.checkpoint import open_checkpoint
from mergequant.errors import VerifyError
from mergequant.integrations.transformers import QuantizedCache
from mergequant.models import ModelShell
from mergequant.nn import KVSpec
from mergequant.pipeline import Quantized, kv, verify
from mergequant.pipeline import run as pipeline_run
from mergequant.transforms import kv_steps

Run = Callable[..., Quantized]
Windows = Callable[..., Tensor]
# A prefix, static steps of o_proj that move into the value projection, and neither.
RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "static": ("mergequant-plus", {"other": "static", "other_bits": 8, "tile": 8, "prefix": "bos"}),
    "rtn": ("rtn", {}),
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The calibration windows of the runs so far."""
    found: list[Tensor] = []
    real = pipeline_run._draw

    def draw(*args: Any) -> Any:
        windows, held_out = real(*args)
        found.append(windows.tokens)
        return windows, held_out

    monkeypatch.setattr(pipeline_run, "_draw", draw)
    return found


@torch.no_grad()
def seen_by_cache(model: Any, tokens: Tensor, skip: int) -> list[tuple[Tensor, ...]]:
    cache = DynamicCache()
    model(tokens, past_key_values=cache)
    return [
        tuple(part[:, :, skip:].transpose(1, 2).flatten(0, 1) for part in (layer.keys, layer.values))
        for layer in cache.layers
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("label", RECIPES)
def test_quantize_on_family_stores_steps_of_the_quantized_models_cache(
    label: str, family: str, run: Run, windows: Windows, drawn: list[Tensor]
) -> None:
    name, settings = RECIPES[label]
    model = make_model(family)
    result = run(model, name, settings=settings)
    checkpoint = open_checkpoint(result.folder)
    loaded = mergequant.load(result.folder)
    skip = 0 if checkpoint.quantization.prefix is None else 1
    states = seen_by_cache(loaded, drawn[-1], skip)
    heads, width = states[0][0].shape[1:]
    assert checkpoint.quantization.kv == KVSpec(2, heads, width, width)
    assert checkpoint.quantization.format_version == "1.4"
    for layer, parts in enumerate(states):
        for part, sample in zip(("key", "value"), parts, strict=True):
            for bits in (8, 4):
                step = checkpoint.get(f"{checkpoint.kv_module}.{part}_scale_{bits}")[layer]
                close = (step / kv_steps(sample, bits) - 1).abs() < 1e-3
                # Rounding to the nearest step of a search may go the other way where two are as good.
                assert float(close.float().mean()) > 0.9, (layer, part, bits)
    assert result.figures["kv_cache"] == "static steps per channel for 8 and 4 bits"
    assert result.figures["auxiliary_bytes"] > 2 * 4 * 4 * heads * width
    for block in result.figures["sites"].values():
        errors = block["kv_cache"]
        assert 0 < errors["key_error_8"] < errors["key_error_4"] < 0.1
        assert 0 < errors["value_error_8"] < errors["value_error_4"] < 0.1
    assert "8 or 4 bits" in (result.folder / "README.md").read_text()

    tokens = windows(model, 3, 17, seed=1)
    with torch.no_grad():
        plain = loaded(tokens).logits
        deviations = [
            float((loaded(tokens, past_key_values=QuantizedCache.for_model(loaded, bits)).logits - plain).norm())
            for bits in (8, 4)
        ]
    assert 0 < deviations[0] < deviations[1] < 0.6 * float(plain.norm())
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = loaded.generate(tokens, past_key_values=QuantizedCache.for_model(loaded, 4, 24), **options)
    assert written.shape == (3, 20)


def _forgets(monkeypatch: pytest.MonkeyPatch, layers: tuple[int, ...] = (0, 1)) -> None:
    """Attention of some layers takes a cache and does not use it."""
    real = LlamaAttention.forward

    def forward(self: Any, *args: object, past_key_values: object = None, **kwargs: object) -> object:
        given = None if self.layer_idx in layers else past_key_values
        return real(self, *args, past_key_values=given, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(LlamaAttention, "forward", forward)


@pytest.mark.parametrize("layers", [(0, 1), (1,)])
def test_quantize_when_blocks_keep_no_cache_says_so_and_goes_on(
    layers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    _forgets(monkeypatch, layers)
    result = run(make_model("llama"), "rtn")
    checkpoint = open_checkpoint(result.folder)
    assert checkpoint.quantization.kv is None
    assert checkpoint.kv_module is None
    name = f"model.layers.{layers[0]}"
    assert result.figures["kv_cache"] == f"none: {name} keeps no keys and values of its own in a cache"
    assert "8 or 4 bits" not in (result.folder / "README.md").read_text()
    mergequant.load(result.folder)


def test_stack_kv_when_blocks_differ_in_shape_gives_nothing() -> None:
    steps = {f"{part}_scale_{bits}": [[0.5, 0.25]] for part in ("key", "value") for bits in (8, 4)}
    other = {name: [[0.5]] for name in steps}
    spec, buffers = kv.stack_kv([steps, steps])
    assert spec == KVSpec(2, 1, 2, 2)
    assert buffers["key_scale_4"].tolist() == [[[0.5, 0.25]]] * 2
    assert kv.stack_kv([steps, other]) == (None, {})
    assert kv.stack_kv([]) == (None, {})
    rotated = {**steps, "key_rotation": "sylvester-1 x sylvester-2"}
    assert kv.stack_kv([rotated, rotated])[0] == KVSpec(2, 1, 2, 2, "sylvester-1 x sylvester-2")
    assert kv.stack_kv([rotated, steps]) == (None, {})
    assert kv.describe_kv([steps, other], ["a", "b"]) == "none: the blocks' keys and values differ in heads or widths"
    assert kv.describe_kv([steps, None], ["a", "b"]).startswith("none: b keeps")


def test_verify_when_stored_steps_are_others_refuses(monkeypatch: pytest.MonkeyPatch, run: Run, tmp_path: Path) -> None:
    real = verify.verify_checkpoint

    def changed(checkpoint: Any, chain: Any, expected: Tensor, steps: dict[str, Tensor]) -> float:
        return real(checkpoint, chain, expected, {**steps, "value_scale_4": steps["value_scale_4"] * 1.01})

    monkeypatch.setattr("mergequant.pipeline.run.verify_checkpoint", changed)
    with pytest.raises(VerifyError, match="value_scale_4"):
        run(make_model("llama"), "rtn", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_beside_blocks_when_blocks_hang_anywhere_gives_their_owner() -> None:
    assert kv.beside_blocks(ModelShell.open(make_model("llama"))) == "model.mergequant_kv"
    assert kv.beside_blocks(ModelShell.open(make_model("opt"))) == "model.decoder.mergequant_kv"
