"""GPTQ onto two-level integers: less output error than rounding, int8 in the middle, groups of neighbours."""

import pytest
import torch
from torch import Tensor

from mergequant.grids import TwoLevelQuantizer, TwoLevelTensor
from mergequant.solvers import Solution, invert_hessian, output_error, two_level


def middle(solution: Solution) -> Tensor:
    assert isinstance(solution.quantized, TwoLevelTensor)
    return solution.quantized.middle()


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("activation_order", [False, True])
def test_two_level_when_hessian_is_given_expect_less_output_error(
    tokens: Tensor, weight: Tensor, group_size: int | None, activation_order: bool
) -> None:
    gram = tokens.t() @ tokens
    quantizer = TwoLevelQuantizer(group_size)
    inverse = invert_hessian(gram, activation_order=activation_order)
    nearest, fed_back = two_level(weight, None, quantizer), two_level(weight, inverse, quantizer)
    errors = [output_error(found.quantized.decode() - weight, gram) for found in (nearest, fed_back)]
    assert errors[1] < 0.8 * errors[0]
    assert fed_back.damping == inverse.damping
    assert torch.equal(fed_back.rows(3, 9).quantized.decode(), fed_back.quantized.decode()[3:9])


def test_two_level_when_compensation_is_strong_expect_the_middle_to_stay_in_int8(tokens: Tensor) -> None:
    """Columns that are nearly copies of one another are pushed far beyond their range."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        close = tokens[:, :1] + 1e-3 * torch.randn(400, 32, generator=generator, dtype=torch.float64)
        weight = torch.rand(64, 32, generator=generator).pow(0.05) * (2 * torch.randint(2, (64, 32)) - 1)
        inverse = invert_hessian(close.t() @ close, damping=1e-6)
        assert middle(two_level(weight, inverse, TwoLevelQuantizer(8, search=False))).dtype == torch.int8


def test_two_level_when_a_channel_is_dead_expect_zeros(tokens: Tensor, weight: Tensor) -> None:
    tokens = tokens.clone()
    tokens[:, 5] = 0
    made = two_level(weight, invert_hessian(tokens.t() @ tokens), TwoLevelQuantizer(8))
    assert not made.quantized.decode()[:, 5].any()
