"""Keys that a quantized cache keeps rotated (`rotate_keys`): what is stored, who reads it, and who refuses to."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import mergequant
from families import make_model
from mergequant import ops
from mergequant.assets import TINY
from mergequant.checkpoint import open_checkpoint
from mergequant.errors import StructureError, UsageError
from mergequant.integrations.transformers import QuantizedCache, serve
from mergequant.integrations.transformers.extract import extract
from mergequant.nn import KVSpec
from mergequant.pipeline import Silent
from mergequant.pipeline import run as pipeline_run
from mergequant.recipes import Recipe, get_recipe
from mergequant.steps import RotateKeys
from mergequant.transforms import kv_steps

FAMILY, HEADS, WIDTH = "qwen3", 2, 12  # 12: a Hadamard matrix that is not symmetric
NAME = ops.rotation(WIDTH).name
ROTATED: dict[str, Any] = {"rotate_keys": True}
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def made(out: Path, windows: Tensor, **settings: Any) -> Path:
    options = {"data": windows, "samples": 4, "seqlen": 24}
    return mergequant.quantize(make_model(FAMILY), "quarot", out=out, settings=settings, **options).folder


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    drawn = torch.randint(3, 97, (6, 24), generator=torch.Generator().manual_seed(7))
    drawn[:, 0] = 1
    return drawn


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, tokens: Tensor) -> tuple[Path, Path]:
    """The same run without and with rotated keys."""
    place = tmp_path_factory.mktemp("keys")
    return made(place / "plain", tokens), made(place / "rotated", tokens, **ROTATED)


@pytest.fixture
def calibration(monkeypatch: pytest.MonkeyPatch, tokens: Tensor) -> Tensor:
    """The windows of `tokens` that these runs are calibrated on."""
    found: list[Tensor] = []

    def stop(*args: Any) -> None:
        found.append(draw(*args)[0].tokens)
        raise KeyboardInterrupt

    draw = pipeline_run._draw
    monkeypatch.setattr(pipeline_run, "_draw", stop)
    with pytest.raises(KeyboardInterrupt):
        mergequant.quantize(make_model(FAMILY), "rtn", data=tokens, samples=4, seqlen=24)
    return found[0]


def test_quantize_when_keys_are_rotated_measures_steps_of_rotated_keys_and_changes_nothing_else(
    folders: tuple[Path, Path], calibration: Tensor
) -> None:
    plain, rotated = (open_checkpoint(folder) for folder in folders)
    assert rotated.quantization.kv == KVSpec(2, HEADS, WIDTH, WIDTH, NAME)
    assert rotated.quantization.format_version == "1.4"
    assert plain.quantization.kv == KVSpec(2, HEADS, WIDTH, WIDTH)
    assert "key_rotation" not in plain.config["quantization_config"]["kv"]
    names = plain.names()
    assert names == rotated.names()
    changed = {name for name in names if not torch.equal(plain.get(name), rotated.get(name))}
    assert changed == {f"{plain.kv_module}.key_scale_{bits}" for bits in (8, 4)}

    cache = DynamicCache()
    with torch.no_grad():
        mergequant.load(folders[1])(calibration, past_key_values=cache)
    for number, layer in enumerate(cache.layers):
        keys = layer.keys.transpose(1, 2).flatten(0, 1).double() @ ops.rotation(WIDTH).matrix()
        for bits in (8, 4):
            step = rotated.get(f"{rotated.kv_module}.key_scale_{bits}")[number]
            # Rounding to the nearest step of a search may go the other way where two are as good.
            assert float(((step / kv_steps(keys, bits) - 1).abs() < 1e-3).float().mean()) > 0.9
    figures = rotated.quantization.figures
    assert figures["kv_cache"] == f"static steps per channel for 8 and 4 bits, keys rotated by {NAME}"
    for block in figures["sites"].values():
        assert 0 < block["kv_cache"]["key_error_8"] < block["kv_cache"]["key_error_4"] < 0.1
    assert f"holds keys rotated by {NAME}" in (folders[1] / "README.md").read_text()


@torch.no_grad()
def test_checkpoint_when_saved_again_keeps_the_rotation_and_every_bit(
    folders: tuple[Path, Path], tokens: Tensor, tmp_path: Path
) -> None:
    model = mergequant.load(folders[1])
    model.save_pretrained(tmp_path / "again")
    first, again = open_checkpoint(folders[1]), open_checkpoint(tmp_path / "again")
    again.validate()
    assert again.quantization.kv == first.quantization.kv
    assert all(torch.equal(first.get(name), again.get(name)) for name in first.names())
    reloaded, unrotated = mergequant.load(tmp_path / "again"), mergequant.load(folders[0])
    own, twin, other = (
        each(tokens, past_key_values=QuantizedCache.for_model(each, 4)).logits for each in (model, reloaded, unrotated)
    )
    assert torch.equal(own, twin)
    assert not torch.equal(own, other)
    assert torch.equal(model(tokens).logits, unrotated(tokens).logits)
    written = model.generate(tokens, past_key_values=QuantizedCache.for_model(model, 4), **GREEDY)
    assert torch.equal(written[:, 24], own[:, -1].argmax(-1))


class _Interrupting(Silent):
    """Stops a run after its first block."""

    def block(self, *_args: Any) -> None:
        raise KeyboardInterrupt


def test_quantize_when_interrupted_finds_the_rotation_in_the_records_of_blocks(
    folders: tuple[Path, Path], tokens: Tensor, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"data": tokens, "samples": 4, "seqlen": 24, "settings": ROTATED}
    with pytest.raises(KeyboardInterrupt):
        mergequant.quantize(make_model(FAMILY), "quarot", out=tmp_path / "cut", reporter=_Interrupting(), **options)
    made(tmp_path / "cut", tokens, **ROTATED)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (folders[1] / name).read_bytes()


def test_evaluate_when_cache_is_quantized_reads_rotated_keys(tmp_path: Path) -> None:
    steps = {"rounding": "rtn", "weight_clip": False, "heads": "none", "activation_bits": 16, "weight_bits": 8}
    text = tmp_path / "text.txt"
    text.write_text("The river rose in spring and fell in autumn; boats came and went with the grain. " * 40)
    scores = {}
    for label, settings in (("plain", {}), ("rotated", ROTATED)):
        windows = torch.randint(3, 8192, (6, 24), generator=torch.Generator().manual_seed(1))
        folder = mergequant.quantize(
            TINY, "quarot", data=windows, samples=4, seqlen=24, out=tmp_path / label, settings={**steps, **settings}
        ).folder
        for bits in (16, 4):
            report = mergequant.evaluate(folder, data=str(text), samples=2, seqlen=32, kv_bits=bits)
            assert report.quantized is not None
            scores[label, bits] = report.quantized.likelihood.nll
    assert scores["plain", 16] == scores["rotated", 16]
    assert len(set(scores.values())) == 3


def test_serve_when_keys_are_rotated_refuses_quantized_caches_and_runs_with_16_bits(
    folders: tuple[Path, Path], tokens: Tensor
) -> None:
    words = rf"model\.mergequant_kv: .*rotated by {NAME} .*Keep 16 bits; or .*serve=False.*without rotate_keys"
    for bits in (8, 4):
        with pytest.raises(UsageError, match=words):
            mergequant.load(folders[1], kv_bits=bits)
        with pytest.raises(UsageError, match=words):
            extract(mergequant.load(folders[1]), bits)
    model = mergequant.load(folders[1], dtype=torch.float32, serve=True)
    want = type(model).generate(model, tokens, **GREEDY)
    assert torch.equal(model.generate(tokens, **GREEDY), want)
    with pytest.raises(UsageError, match=words):
        serve(model, 4)
    assert torch.equal(model.generate(tokens, **GREEDY), want)


@pytest.mark.parametrize("recipe", ["quarot", "spinquant"])
def test_plan_when_heads_have_no_hadamard_matrix_refuses_and_says_what_to_do(recipe: str) -> None:
    model = make_model("llama")
    with pytest.raises(StructureError, match=r"10 channels.*cosine-5.*rotate_keys=false"):
        mergequant.plan(model, recipe, settings=ROTATED)
    assert mergequant.plan(model, recipe).sites


def test_plan_when_model_keeps_no_cache_refuses_and_names_recipes_that_work() -> None:
    recipe = Recipe("own", "", (*get_recipe("rtn").steps, RotateKeys()))
    with pytest.raises(StructureError, match=r"no cache.*smoothquant or gptq"):
        mergequant.plan(make_model("bert"), recipe)
