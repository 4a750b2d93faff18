"""Learned rotations: they keep the function, lower the loss, and come out the same again."""

from typing import Any

import pytest
import torch
from torch import Tensor

from default_recipes import REFUSED
from families import FAMILIES, make_model
from mergequant.errors import NumericsError, RecipeError, StructureError
from mergequant.models import ModelShell
from mergequant.models.probe import all_double
from mergequant.steps import LearnRotations
from mergequant.steps.learn_rotations import RESIDUAL

CAUSAL = [family for family in FAMILIES if "bert" not in family]
SERVED = [family for family in CAUSAL if family not in REFUSED["spinquant"]]


def windows(seed: int = 7) -> Tensor:
    """Random tokens behind a BOS."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 97, (8, 24), generator=generator)
    tokens[:, 0] = 1
    return tokens


def learned(
    step: LearnRotations, family: str = "llama", **options: Any
) -> tuple[ModelShell, dict[str, Tensor], list[str]]:
    shell = ModelShell.open(make_model(family, dtype=options.get("dtype", torch.float32)), **options)
    shell.apply(step.transform(shell, 0))
    lines: list[str] = []
    return shell, step.learn(shell, windows(), 0, lines.append), lines


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("family", SERVED)
def test_refined_model_on_family_expect_equal_logits_in_float64(family: str, heads: bool) -> None:
    model = make_model(family, dtype=torch.float64)
    shell = ModelShell.open(model, dtype=torch.float64)
    step = LearnRotations(heads=heads)
    shell.apply(step.transform(shell, 3))
    generator = torch.Generator().manual_seed(1)
    sizes = {name: value.shape[0] for name, value in step._identities(shell).items()}
    drawn = {
        name: torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]
        for name, size in sizes.items()
    }
    assert len(drawn) == 1 + heads * len(shell.blocks)
    assert shell.apply(step.refine(shell, drawn)) <= 1e-10
    for index in range(len(shell.blocks)):
        shell.load_block(index)
    tokens = windows()[:2, :20]
    with torch.no_grad(), all_double():
        expected, found = model(tokens).logits, shell.model(tokens).logits
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-10


def test_learn_expect_orthogonal_matrices_a_lower_loss_and_the_same_again() -> None:
    step = LearnRotations(bits=3, steps=24, batch_tokens=10_000)
    shell, found, lines = learned(step)
    losses = [float(line.rpartition(" ")[2]) for line in lines]
    assert len(losses) == 24
    assert sum(losses[-4:]) < sum(losses[:4])
    for value in found.values():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value @ value.t(), torch.eye(value.shape[0], dtype=value.dtype))
        assert not torch.allclose(value, torch.eye(value.shape[0], dtype=value.dtype))
    assert set(found) == {RESIDUAL, "head.0", "head.1"}
    assert all(parameter.is_meta for parameter in shell.blocks[0].parameters())
    again = learned(step)[1]
    assert all(torch.equal(value, again[name]) for name, value in found.items())


def test_learn_when_there_are_no_steps_expect_identities() -> None:
    _, found, lines = learned(LearnRotations(steps=0))
    assert not lines
    assert all(torch.equal(value, torch.eye(value.shape[0], dtype=value.dtype)) for value in found.values())


def test_learn_when_the_loss_is_not_finite_expect_error_and_empty_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    step = LearnRotations(steps=2)
    shell = ModelShell.open(make_model("llama"))
    shell.apply(step.transform(shell, 0))
    shell.outside_parts().head.weight.fill_(torch.inf)
    with pytest.raises(NumericsError, match=r"lower learn_rotations\.rate"):
        step.learn(shell, windows(), 0, print)
    assert all(parameter.is_meta for parameter in shell.blocks[0].parameters())


@pytest.mark.parametrize("family", [family for family in REFUSED["spinquant"] if family in CAUSAL])
def test_transform_when_family_cannot_be_rotated_expect_refusal(family: str) -> None:
    shell = ModelShell.open(make_model(family))
    with pytest.raises(StructureError, match="mergequant-plus"):
        shell.apply(LearnRotations().transform(shell, 0))


@pytest.mark.parametrize("wrong", [{"steps": -1}, {"rate": 0.0}, {"batch_tokens": 0}, {"clip_ratio": 1.5}])
def test_step_when_a_parameter_is_out_of_range_expect_error(wrong: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="learn_rotations"):
        LearnRotations(**wrong)  # type: ignore[arg-type]
