"""What surrounds the blocks: plan, windows, tokenizer, result."""

import gc
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import mergequant
from families import FAMILIES, make_model
from mergequant.assets import TINY
from mergequant.calibration import chain as chain_module
from mergequant.checkpoint import open_checkpoint
from mergequant.errors import CheckpointError, UsageError
from mergequant.pipeline import Quantized

BARE = {"split": 0, "clip": "none", "compensation": "none", "rounding": "rtn", "round.clip": False}

Run = Callable[..., Quantized]
Windows = Callable[..., Tensor]


def test_quantize_when_a_window_fills_a_chunk_verifies_and_gives_the_same_layers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run: Run
) -> None:
    """Long windows run one by one; the two that verify the checkpoint stay together."""
    model = make_model("llama")
    together = run(model, "mergequant-w4a8", tmp_path / "a", settings={"tile": 8})
    monkeypatch.setattr(chain_module, "TOKENS_PER_CHUNK", 24)
    apart = run(model, "mergequant-w4a8", tmp_path / "b", settings={"tile": 8})
    first, second = (open_checkpoint(result.folder).quantization.layers for result in (together, apart))
    assert first == second


def test_quantize_when_data_are_tokens_takes_bos_from_the_config(run: Run, windows: Windows) -> None:
    model = make_model("llama")
    result = run(model, "mergequant-plus", settings={"tile": 8})
    quantization = open_checkpoint(result.folder).quantization
    assert quantization.prefix.tokens == (1,)
    assert quantization.prefix.replaces_bos
    assert quantization.provenance["calibration"]["bos"] is True
    tokens = windows(model)
    tokens[0, 0] = 5
    without = run(model, "rtn", data=tokens)
    assert open_checkpoint(without.folder).quantization.provenance["calibration"]["bos"] is False


def test_quantize_when_tokenizer_adds_no_bos_writes_one_that_does(tmp_path: Path) -> None:
    settings = {**BARE, "tensor_input.steps": 2}
    made = mergequant.quantize(TINY, "mergequant-plus", settings=settings, samples=2, seqlen=16, out=tmp_path / "out")
    before, after = AutoTokenizer.from_pretrained(TINY), AutoTokenizer.from_pretrained(made.folder)
    ids = after("Once upon a time")["input_ids"]
    assert ids[0] == before.bos_token_id
    assert ids[1:] == [token for token in before("Once upon a time")["input_ids"] if token != before.bos_token_id]
    written = made.model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False)
    assert written.shape == (1, len(ids) + 3)
    assert {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in made.folder.iterdir()
    }


def test_quantized_when_without_folder_vanishes_with_the_result(run: Run, tmp_path: Path) -> None:
    result = run(make_model("llama"), "rtn")
    folder = result.folder
    kept = result.save(tmp_path / "kept")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del result
        gc.collect()
    assert not folder.exists()
    assert mergequant.load(kept).config.model_type == "llama"


def test_quantized_save_when_folder_is_taken_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    result = run(make_model("llama"), "rtn")
    assert result.save(tmp_path / "kept") == tmp_path / "kept"
    with pytest.raises(UsageError, match="not empty"):
        result.save(tmp_path / "kept")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="not empty"):
        result.save(tmp_path / "file")


def test_quantized_save_when_another_run_is_unfinished_there_leaves_it_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "kept.partial").mkdir()
    (tmp_path / "kept.partial" / "block-00000.json").write_text("{}")
    result = run(make_model("llama"), "rtn")
    result.save(tmp_path / "kept")
    assert (tmp_path / "kept.partial" / "block-00000.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "kept.partial"]
    with pytest.raises(CheckpointError, match="/proc/kept"):
        result.save("/proc/kept")


@pytest.mark.parametrize("family", FAMILIES)
def test_plan_on_family_agrees_with_the_run(family: str, run: Run) -> None:
    model = make_model(family)
    planned = mergequant.plan(model, "mergequant", samples=4, seqlen=24)
    result = run(model, "mergequant")
    assert planned.parameters == result.figures["parameters"] == sum(p.numel() for p in set(model.parameters()))
    assert planned.linear_parameters == result.figures["linear_parameters"]
    assert planned.kept == {}
    names = {f"{site.block}.{name}" for site in planned.sites for name in site.linears}
    layers = open_checkpoint(result.folder).quantization.layers
    assert names == {name for name, spec in layers.items() if hasattr(spec, "outputs")}
    assert math.isfinite(planned.seconds)
    assert planned.to_dict()["sites"]


def test_report_when_run_is_watched_tells_every_block(run: Run) -> None:
    seen: list[tuple[int, int, str]] = []
    errors: list[float] = []

    class Watcher:
        def phase(self, text: str) -> None:
            assert text

        def progress(self, text: str) -> None:
            assert text

        def block(self, index: int, total: int, name: str, figures: dict[str, float]) -> None:
            seen.append((index, total, name))
            errors.append(figures["output_error"])

    run(make_model("llama"), "mergequant-w4a8", reporter=Watcher())
    assert seen == [(1, 2, "model.layers.0"), (2, 2, "model.layers.1")]
    assert all(0 < error < 0.1 for error in errors)
