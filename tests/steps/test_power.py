"""Power grids at work on a block and in a whole run."""

from collections.abc import Callable

import pytest
import torch

from mergequant import ops
from mergequant.calibration import BlockContext, SiteContext
from mergequant.errors import RecipeError
from mergequant.nn import QuantLinear
from mergequant.recipes import get_recipe
from mergequant.steps import PowerRound, TokenInput

Opener = Callable[..., BlockContext]


def opened(open_block: Opener) -> SiteContext:
    context = open_block()
    return context.site(context.structure.sites[0])


def module_of(own: SiteContext) -> QuantLinear:
    module = own.block.module.get_submodule(own.site.consumers[0])
    assert isinstance(module, QuantLinear)
    return module


@pytest.mark.parametrize("bits", [3, 4])
def test_power_round_expect_modules_that_decode_what_was_solved(open_block: Opener, bits: int) -> None:
    own = opened(open_block)
    PowerRound(method="rtn", bits=bits, group_size=8, learn=10, dense=True).run(own)
    for name, solution in own.solutions.items():
        module = own.block.module.get_submodule(name)
        assert isinstance(module, QuantLinear)
        assert module.spec.exponent < 1
        assert torch.equal(module.decoded_weight(), solution.quantized.decode())
    assert own.block.figures[own.site.name]["smallest_exponent"] < 1


def test_power_round_when_inputs_are_integers_expect_one_integer_product_on_squares(open_block: Opener) -> None:
    own = opened(open_block)
    TokenInput(bits=8, search=False).run(own)
    PowerRound(method="gptq", exponent=0.5).run(own)
    module = module_of(own)
    squares = module.integer_weight()
    assert set(squares.unique().tolist()) <= {part * abs(part) for part in range(-7, 8)}
    assert module.spec.gemm_bits == 8
    x = torch.randn(5, module.in_features, generator=torch.Generator().manual_seed(0))
    codes, scale = ops.dynamic_quant(x, 1.0, 8)
    exact = (codes.double() @ squares.double().t()) * scale.double() * module.weight_scale.double()
    assert module.input_quantizer is not None
    torch.testing.assert_close(module(x).double(), exact, rtol=1e-5, atol=1e-5)
    tiles = ops.tile_weight(squares, 8)
    stored = module.weight_codes.clone()
    module.adopt(tiles, slice(0, module.out_features))
    assert torch.equal(module.weight_codes, stored)  # squares give their codes back
    other = opened(open_block)
    TokenInput(bits=8, search=False).run(other)
    with pytest.raises(RecipeError, match="whole numbers"):
        PowerRound(exponent=0.6).run(other)


def test_power_round_when_settings_make_no_sense_expect_refusal() -> None:
    with pytest.raises(RecipeError, match="zero must stay zero"):
        PowerRound(zeros=True)
    with pytest.raises(RecipeError, match="0 searches it"):
        PowerRound(exponent=3.0)
    with pytest.raises(RecipeError, match="whole weights"):
        get_recipe("powerquant", activation_bits=8)
    steps = get_recipe("powerquant", group_size=16).steps
    assert [step.name for step in steps] == ["search_exponent", "power_round"]
    assert [step.name for step in get_recipe("nupes", exponent="layer").steps] == ["power_round"]
