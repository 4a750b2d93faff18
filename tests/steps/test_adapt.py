"""AdaDim at work on a block."""

from collections.abc import Callable

import pytest
import torch

from mergequant.calibration import BlockContext, SiteContext
from mergequant.errors import RecipeError
from mergequant.nn import QuantLinear
from mergequant.recipes import get_recipe
from mergequant.solvers import output_error
from mergequant.steps import AdaptiveRound, Rotate, Round, TokenInput

Opener = Callable[..., BlockContext]


def opened(open_block: Opener, number: int) -> SiteContext:
    context = open_block()
    return context.site(context.structure.sites[number])


def step(**settings: object) -> AdaptiveRound:
    made = get_recipe("adadim", group_size=8, **settings).steps[0]
    assert isinstance(made, AdaptiveRound)
    return made


@pytest.mark.parametrize("rounding", ["rtn", "gptq", "quantease"])
def test_adaptive_round_when_judged_by_layer_expect_the_better_direction_of_each(
    open_block: Opener, rounding: str
) -> None:
    """The last columns are made small, and rows of the first consumer uneven, so that directions differ."""
    chosen = set()
    for number in range(4):
        errors = {}
        for axis in ("adaptive", "row", "column"):
            own = opened(open_block, number)
            for name, weight in own.weights.items():
                weight[:, 30:] /= 8
                if name == own.site.consumers[0]:
                    weight[::5] *= 8
            own.open()
            weights, gram = dict(own.weights), own.gram().total
            step(rounding=rounding, axis=axis, judge="layer").run(own)
            solved = {name: solution.quantized.decode() for name, solution in own.solutions.items()}
            errors[axis] = {name: output_error(made - weights[name], gram) for name, made in solved.items()}
            if axis == "adaptive":
                specs = {name: own.block.module.get_submodule(name).spec for name in own.site.consumers}
                chosen |= {spec.across for spec in specs.values()}
        for name, error in errors["adaptive"].items():
            assert error == min(errors["row"][name], errors["column"][name])
            assert specs[name].across == (errors["column"][name] < errors["row"][name])
    assert chosen == {False, True}


def test_adaptive_round_when_judged_by_module_expect_modules_that_decode_what_was_solved(open_block: Opener) -> None:
    for number in range(3):  # of equal width, so that groups mix large columns with small ones
        own = opened(open_block, number)
        for name in own.site.consumers:
            own.block.linear(name).weight[:, ::8] *= 8
            own.weights[name][:, ::8] *= 8
        step().run(own)
        for name in own.site.consumers:
            module = own.block.module.get_submodule(name)
            assert isinstance(module, QuantLinear)
            assert module.spec.across
            assert module.spec.dense
            assert torch.equal(module.decoded_weight(), own.solutions[name].quantized.decode())
            assert module.weight_codes.numel() == module.spec.outputs * -(-module.spec.input.width * 3 // 8)
        assert own.block.figures[own.site.name]["columns"] == 1.0


def test_adaptive_round_when_axis_is_row_expect_plain_rounding(open_block: Opener) -> None:
    made = {}
    for kind in (AdaptiveRound, Round):
        own = opened(open_block, 0)
        settings = step(axis="row").to_dict()
        shared = {key: value for key, value in settings.items() if key in Round.__dataclass_fields__}
        shared["sites"] = tuple(shared["sites"])
        (step(axis="row") if kind is AdaptiveRound else Round(**shared)).run(own)
        made[kind] = [solution.quantized.decode() for solution in own.solutions.values()]
    assert all(torch.equal(one, other) for one, other in zip(made[AdaptiveRound], made[Round]))


def test_adaptive_round_when_inputs_are_quantized_or_rotated_expect_refusal(open_block: Opener) -> None:
    for before in (TokenInput(), Rotate()):
        own = opened(open_block, 0)
        before.run(own)
        with pytest.raises(RecipeError, match="round by gptq"):
            step().run(own)
    with pytest.raises(RecipeError, match="levels 2"):
        AdaptiveRound(levels=2)
