"""Power grids (NUPES digest, "How to know it works")."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.grids import IntegerGrid, PowerGrid, Quantizer
from mergequant.grids.power import power_levels
from mergequant.solvers import (
    LearnedPower,
    exponent_losses,
    gptq,
    learn_power,
    output_error,
    quantease,
    rtn,
    search_exponent,
)
from mergequant.solvers.power import EXPONENTS

UNIFORM = Quantizer(IntegerGrid(4))


def draw(kind: str) -> Tensor:
    torch.manual_seed(0)
    if kind == "uniform":
        return torch.rand(128, 1024) * 2 - 1
    laws = {
        "gaussian": torch.distributions.Normal(0.0, 1.0),
        "laplace": torch.distributions.Laplace(0.0, 1.0),
        "t5": torch.distributions.StudentT(5.0),
        "t3": torch.distributions.StudentT(3.0),
    }
    return laws[kind].sample((128, 1024))


@pytest.mark.parametrize(
    ("kind", "exponent", "gain"),
    [("uniform", 1.0, 1.0), ("gaussian", 0.72, 1.29), ("laplace", 0.57, 1.96), ("t5", 0.53, 2.4), ("t3", 0.44, 3.75)],
)
def test_search_exponent_expect_the_digest_table(kind: str, exponent: float, gain: float) -> None:
    weight = draw(kind)
    losses = exponent_losses(weight, UNIFORM).square()
    found = search_exponent(weight, UNIFORM)
    assert abs(found - exponent) <= 0.05
    assert float(losses[-1] / losses[EXPONENTS.index(found)]) == pytest.approx(gain, rel=0.15)


@pytest.mark.parametrize("group_size", [None, 8])
def test_power_grid_when_exponent_is_one_expect_the_uniform_grid_bit_for_bit(
    weight: Tensor, group_size: int | None
) -> None:
    power = Quantizer(PowerGrid(4, 1.0), group_size).encode(weight)
    uniform = Quantizer(IntegerGrid(4), group_size).encode(weight)
    assert torch.equal(power.codes, uniform.codes)
    assert torch.equal(power.scale, uniform.scale)
    assert torch.equal(power.decode(), uniform.decode())


@pytest.mark.parametrize("exponent", [0.2, 0.37, 0.5, 0.72, 1.2])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_power_grid_expect_nearest_of_its_own_values_and_zero_kept(bits: int, exponent: float) -> None:
    for nearest_by in ("power", "value"):
        grid = PowerGrid(bits, exponent, nearest_by)  # type: ignore[arg-type]
        codes = torch.arange(grid.low, grid.high + 1).float()
        assert torch.equal(grid.nearest(grid.value(codes)), codes)
        assert float(grid.value(torch.zeros(1))) == 0
        assert grid.reach == float(grid.value(torch.tensor([float(grid.high)])))
    x = torch.linspace(-1.1, 1.1, 301) * grid.reach
    levels = grid.value(codes)
    chosen = grid.value(grid.nearest(x))
    torch.testing.assert_close((x - chosen).abs(), (x[:, None] - levels).abs().amin(1), rtol=1e-5, atol=1e-5)


def test_power_grid_when_exponent_is_a_half_expect_an_integer_product_and_not_the_power_of_a_sum() -> None:
    """Decode, then multiply, equals the integer sum of squared codes exactly; undoing the power of a sum does not."""
    generator = torch.Generator().manual_seed(1)
    codes = [torch.randint(-7, 8, (16, 64), generator=generator) for _ in range(2)]
    squares = [part * part.abs() for part in codes]
    assert power_levels(4, 0.5).tolist() == [part * abs(part) for part in range(-7, 8)]
    decoded = [PowerGrid(4, 0.5).value(part.float()) for part in codes]
    exact = (squares[0] @ squares[1].t()).float()
    assert torch.equal(decoded[0] @ decoded[1].t(), exact)
    summed = (codes[0] @ codes[1].t()).float()
    assert float((summed * summed.abs() - exact).norm() / exact.norm()) > 1


def test_rounding_on_power_grids_expect_less_error_in_the_order_of_the_papers(tokens: Tensor) -> None:
    gram = tokens.t() @ tokens
    weight = draw("t5")[:64, :32].contiguous()
    for bits in (3, 4):
        uniform = Quantizer(IntegerGrid(bits))
        grid = PowerGrid(bits, search_exponent(weight, uniform))
        start = rtn(weight, Quantizer(grid))
        learned = learn_power(weight, gram, start, LearnedPower(steps=150))
        column = Quantizer(replace(grid, nearest_by="value"))
        made = {
            "rtn": rtn(weight, uniform),
            "power": start,
            "learned": learned,
            "gptq": gptq(weight, gram, uniform),
            "gptq-power": gptq(weight, gram, column),
            "quantease-power": quantease(weight, gram, column),
        }
        errors = {name: output_error(solution.quantized.decode() - weight, gram) for name, solution in made.items()}
        assert errors["learned"] < 0.97 * errors["power"] < errors["power"] < errors["rtn"]
        assert max(errors["gptq-power"], errors["quantease-power"]) < min(errors["gptq"], errors["learned"])
        assert (learned.quantized.codes - start.quantized.codes).any()


def test_learn_power_when_exponent_starts_high_on_gaussian_weights_expect_it_to_fall() -> None:
    weight, gram = draw("gaussian")[:, :64].contiguous(), torch.eye(64, dtype=torch.float64)
    start = rtn(weight, Quantizer(PowerGrid(4, 0.9)))
    rates = LearnedPower(steps=200, code_rate=0.0, exponent_rate=4e-3)
    learned = learn_power(weight, gram, start, rates).quantized
    assert isinstance(learned.grid, PowerGrid)
    assert 0.65 < learned.grid.exponent < 0.8
    assert float((learned.decode() - weight).norm()) < 0.98 * float((start.quantized.decode() - weight).norm())
    kept = learn_power(weight, gram, start, replace(rates, exponent_rate=0.0)).quantized
    assert torch.equal(kept.decode(), start.quantized.decode())


def test_power_grid_when_asked_for_what_it_cannot_expect_refusal(weight: Tensor) -> None:
    with pytest.raises(UsageError, match=r"choose 0\.2"):
        PowerGrid(4, 0.1)
    with pytest.raises(UsageError, match="staggered"):
        PowerGrid(4).nearest(weight, torch.ones(1))
    with pytest.raises(UsageError, match="starts from codes of a power grid"):
        learn_power(weight, torch.eye(32).double(), rtn(weight, UNIFORM), LearnedPower())
