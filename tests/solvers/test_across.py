"""Groups down the columns (AdaDim digest, "How to know it works")."""

import pytest
import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.grids import AbsMax, AcrossTensor, IntegerGrid, Quantizer, encode_across
from mergequant.solvers import Descent, across, across_descent, gptq, invert_hessian, output_error, rtn


def plain(bits: int = 3, group_size: int | None = 8, zeros: bool = True) -> Quantizer:
    return Quantizer(IntegerGrid(bits), group_size, AbsMax(), zeros)


def relative(values: Tensor, weight: Tensor, gram: Tensor) -> float:
    return output_error(values - weight, gram) / output_error(weight, gram)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group_size", [None, 8])
def test_encode_across_expect_the_transpose_of_the_transpose(
    weight: Tensor, zeros: bool, group_size: int | None
) -> None:
    quantizer = plain(3, group_size, zeros)
    turned, made = quantizer.encode(weight.t()), encode_across(weight, quantizer)
    assert torch.equal(made.decode(), turned.decode().t())
    assert made.bits_per_element() == turned.bits_per_element()
    size = group_size or 24
    assert made.size == size
    part = made.rows(0, size)
    assert torch.equal(part.decode(), made.decode()[:size])
    with pytest.raises(UsageError, match="does not divide"):
        encode_across(weight, plain(3, 7))


@pytest.mark.parametrize("zeros", [False, True])
def test_across_when_hessian_is_diagonal_expect_rtn_exactly(weight: Tensor, zeros: bool) -> None:
    diagonal = torch.rand(32, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
    solved = across(weight, invert_hessian(torch.diag(diagonal)), plain(4, 8, zeros)).quantized
    assert torch.equal(solved.decode(), encode_across(weight, plain(4, 8, zeros)).decode())


def test_across_when_inputs_are_correlated_expect_gptq_below_rtn_and_descent_below_both(
    tokens: Tensor, weight: Tensor
) -> None:
    gram, quantizer = tokens.t() @ tokens, plain()
    rounded = across(weight, None, quantizer)
    solved = across(weight, invert_hessian(gram), quantizer)
    polished = across_descent(weight, gram, solved, Descent("gptq", 8, relax=False)).quantized
    errors = [relative(made.decode(), weight, gram) for made in (polished, solved.quantized, rounded.quantized)]
    assert errors == sorted(errors)
    assert 1.3 * errors[1] < errors[2]
    assert isinstance(polished, AcrossTensor)
    assert torch.equal(polished.scale, solved.quantized.scale)


def planted(seed: int, case: str, width: int = 128) -> tuple[Tensor, Tensor]:
    """The digest's cases: input channels times 20, some of whose columns, or rows, differ in size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(width, width, generator=generator)
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    x = torch.randn(1024, width, generator=generator) / torch.arange(1, width + 1).sqrt() @ turn
    chosen = torch.randperm(width, generator=generator)[:6]
    if case == "small columns of large inputs":
        x[:, chosen] *= 20
        weight[:, chosen] /= 4
    elif case == "large columns":
        weight[:, chosen] *= 8
    else:
        weight[chosen] *= 8
    return weight, x.double().t() @ x.double()


@pytest.mark.parametrize("solver", ["rtn", "gptq"])
@pytest.mark.parametrize(
    ("case", "columns"), [("small columns of large inputs", True), ("large columns", True), ("large rows", False)]
)
def test_across_when_columns_or_rows_differ_expect_the_direction_that_isolates_them(
    case: str, columns: bool, solver: str
) -> None:
    for seed in range(3):
        weight, gram = planted(seed, case)
        quantizer, inverse = plain(3, 32), None if solver == "rtn" else invert_hessian(gram)
        down = relative(across(weight, inverse, quantizer).quantized.decode(), weight, gram)
        along = rtn(weight, quantizer) if inverse is None else gptq(weight, inverse, quantizer)
        assert (down < 0.95 * relative(along.quantized.decode(), weight, gram)) == columns
