"""qllm: what its parameters make of its steps, and what a checkpoint says of it."""

import pytest

from families import make_model
from mergequant.errors import RecipeError
from mergequant.models import ModelShell
from mergequant.pipeline.plan import make_plan
from mergequant.recipes import get_recipe
from mergequant.steps import LowRank, Reassemble, Round


def test_qllm_when_default_expect_the_papers_steps() -> None:
    recipe = get_recipe("qllm")
    assert [step.name for step in recipe.steps] == ["token_input", "reassemble", "low_rank", "round"]
    correction = next(step for step in recipe.steps if isinstance(step, LowRank))
    assert (correction.rank, correction.epochs, correction.learning_rate) == (4, 10, 5e-4)
    assert (correction.apart, correction.round_weights, correction.norms) == (True, True, True)
    last = recipe.steps[-1]
    assert isinstance(last, Round)
    assert (last.method, last.bits, last.clip) == ("rtn", 4, False)


@pytest.mark.parametrize(("correction", "flags"), [("merged", (True, False)), ("inputs", (False, False))])
def test_qllm_when_correction_is_another_expect_the_loop_to_round_as_asked(
    correction: str, flags: tuple[bool, bool]
) -> None:
    step = next(step for step in get_recipe("qllm", correction=correction).steps if isinstance(step, LowRank))
    assert (step.round_weights, step.apart) == flags


def test_qllm_when_nothing_is_taken_apart_expect_token_scales_everywhere() -> None:
    recipe = get_recipe("qllm", expansion=0.0, correction="none")
    assert not any(isinstance(step, Reassemble) for step in recipe.steps)
    shell = ModelShell.open(make_model("llama"))
    planned = make_plan(shell, shell.structures, recipe, 4, 24)
    assert {site.inputs for site in planned.sites} == {"int4 dynamic per token"}


def test_plan_when_channels_are_reassembled_expect_it_said() -> None:
    shell = ModelShell.open(make_model("llama"))
    planned = make_plan(shell, shell.structures, get_recipe("qllm"), 4, 24)
    inputs = {site.kind: site.inputs for site in planned.sites}
    assert inputs["norm"] == inputs["mlp_output"] == "int4 dynamic per token, channels reassembled"
    assert inputs["attention_output"] == "int4 dynamic per token"


def test_qllm_when_expansion_is_beyond_half_expect_refused() -> None:
    with pytest.raises(RecipeError, match=r"between 0 and 0\.5"):
        get_recipe("qllm", expansion=0.7)
