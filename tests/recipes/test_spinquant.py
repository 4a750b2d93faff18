"""SpinQuant's steps and settings, and that an interrupted run goes on with what it has learned."""

from pathlib import Path
from typing import Any

import pytest
import torch

import mergequant
from families import make_model
from mergequant.errors import RecipeError
from mergequant.pipeline import Silent
from mergequant.recipes import Recipe, get_recipe
from mergequant.steps import LearnRotations, Rotate, RotateKeys, Round, TokenInput


def test_spinquant_when_plain_expect_the_papers_defaults() -> None:
    chosen = get_recipe("spinquant")
    assert [type(step) for step in chosen.steps] == [LearnRotations, Rotate, TokenInput, Round]
    learn = chosen.steps[0]
    assert isinstance(learn, LearnRotations)
    assert (learn.steps, learn.rate, learn.heads) == (100, 1.5, True)
    assert chosen.steps[1] == Rotate(("mlp_output",))
    assert chosen.prefix == "none"
    assert Recipe.from_yaml(chosen.to_yaml()) == chosen
    assert get_recipe("spinquant", rotate_keys=True).steps == (*chosen.steps, RotateKeys())


def test_spinquant_when_weight_only_expect_error() -> None:
    with pytest.raises(RecipeError, match="quarot"):
        get_recipe("spinquant", activation_bits=16)


class _Interrupting(Silent):
    """Stops a run after its first block."""

    def block(self, *_args: Any) -> None:
        raise KeyboardInterrupt


def test_quantize_when_interrupted_expect_the_learned_rotations_to_be_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    tokens = torch.randint(3, 97, (6, 24), generator=torch.Generator().manual_seed(7))
    options: dict[str, Any] = {"data": tokens, "samples": 4, "seqlen": 24, "settings": {"steps": 3}}
    whole = mergequant.quantize(model, "spinquant", out=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        mergequant.quantize(model, "spinquant", out=tmp_path / "cut", reporter=_Interrupting(), **options)
    assert (tmp_path / "cut.partial" / "learned.safetensors").is_file()
    monkeypatch.setattr(LearnRotations, "learn", lambda *_: pytest.fail("learned again"))
    resumed = mergequant.quantize(model, "spinquant", out=tmp_path / "cut", **options)
    first, second = (made.folder / "model.safetensors" for made in (whole, resumed))
    assert first.read_bytes() == second.read_bytes()
    assert not (tmp_path / "cut.partial").exists()
