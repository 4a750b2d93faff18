"""Coordinate descent (QuantEase digest, "How to know it works")."""

import itertools

import pytest
import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.grids import AbsMax, ClipSearch, IntegerGrid, Quantizer, SparseTensor
from mergequant.solvers import (
    Descent,
    OutlierShare,
    descend,
    gptq,
    invert_hessian,
    output_error,
    quantease,
    quantease_outliers,
    rtn,
)


def plain(bits: int = 3, group_size: int | None = None, zeros: bool = False) -> Quantizer:
    return Quantizer(IntegerGrid(bits), group_size, AbsMax(), zeros)


def layer(seed: int, width: int = 128) -> tuple[Tensor, Tensor]:
    """A weight with heavy tails and the Gram matrix of inputs with a falling spectrum and four large channels."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(width, width, 6, generator=generator)
    weight = normal[..., 0] / normal[..., 1:].square().mean(-1).sqrt()
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    x = torch.randn(2048, width, generator=generator) / torch.arange(1, width + 1).sqrt() @ turn
    x += 0.05 * torch.randn(2048, width, generator=generator)
    x[:, torch.randperm(width, generator=generator)[:4]] *= 20
    return weight, (x.double().t() @ x.double())


def error(values: Tensor, weight: Tensor, gram: Tensor) -> float:
    return output_error(values - weight, gram) / output_error(weight, gram)


@pytest.mark.parametrize("start", ["rtn", "gptq"])
@pytest.mark.parametrize("group_size", [None, 8])
def test_descend_when_all_sweeps_round_expect_error_never_to_rise(
    tokens: Tensor, weight: Tensor, start: str, group_size: int | None
) -> None:
    gram, quantizer = tokens.t() @ tokens, plain(3, group_size)
    solved = rtn(weight, quantizer) if start == "rtn" else gptq(weight, gram, quantizer, activation_order=False)
    scale = solved.quantized.scale.double().repeat_interleave(group_size or 32, 1)
    errors = [output_error(solved.quantized.decode().double() - weight.double(), gram)]

    def measure(values: Tensor) -> Tensor:
        errors.append(output_error(values - weight.double(), gram))
        return weight.double()

    values = descend(
        weight.double(),
        gram,
        lambda column, best: quantizer.grid.nearest(best / scale[:, column]) * scale[:, column],
        Descent(sweeps=8, relax=False),
        start=solved.quantized.decode(),
        after=measure,
    )
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.99 * errors[0]
    assert torch.equal(quantizer.grid.nearest(values / scale) * scale, values)


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("block", [1, 5, 128])
def test_descend_when_vectorized_expect_the_naive_columns(
    tokens: Tensor, weight: Tensor, order: bool, block: int
) -> None:
    """Every beta from its definition, with the values as they are at that moment."""
    gram, target, descent = tokens.t() @ tokens, weight.double(), Descent(sweeps=5, activation_order=order)
    scale = rtn(weight, plain()).quantized.scale.double()[:, 0]
    values = target.clone()
    visited = torch.argsort(gram.diagonal(), descending=True, stable=True) if order else torch.arange(32)
    for sweep in range(5):
        for column in visited.tolist():
            others = torch.arange(32) != column
            best = target @ gram[:, column] - values[:, others] @ gram[others, column]
            best /= gram[column, column]
            rounded = (best / scale).round().clamp(-4, 3) * scale
            values[:, column] = best if descent.relaxes(sweep) else rounded
    assert [sweep for sweep in range(5) if descent.relaxes(sweep)] == [1]

    def nearest(_column: int, best: Tensor) -> Tensor:
        return (best / scale).round().clamp(-4, 3) * scale

    found = descend(target, gram, nearest, descent, block=block)
    torch.testing.assert_close(found, values, rtol=1e-6, atol=1e-6)


def test_relaxes_when_thirty_sweeps_expect_every_third_and_never_the_last() -> None:
    assert [sweep for sweep in range(30) if Descent().relaxes(sweep)] == list(range(1, 26, 3))
    for sweeps in range(1, 40):
        assert not Descent(sweeps=sweeps).relaxes(sweeps - 1)
    with pytest.raises(UsageError, match="at least one sweep"):
        Descent(sweeps=0)


def test_quantease_when_four_columns_expect_a_minimum_between_the_optimum_and_its_start() -> None:
    generator = torch.Generator().manual_seed(3)
    optimal = 0
    for _ in range(40):
        x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
        x += 2 * torch.randn(50, 1, generator=generator, dtype=torch.float64)
        gram, row = x.t() @ x, torch.randn(1, 4, generator=generator)
        scale = rtn(row, plain(2)).quantized.scale
        candidates = torch.tensor(list(itertools.product(range(-2, 2), repeat=4)), dtype=torch.float64) * scale.double()
        costs = ((candidates - row.double()) @ gram * (candidates - row.double())).sum(1)
        first = output_error(rtn(row, plain(2)).quantized.decode().double() - row.double(), gram)
        solved = quantease(row, gram, plain(2), Descent("rtn", relax=False)).quantized
        reached = output_error(solved.decode().double() - row.double(), gram)
        assert float(costs.min()) * (1 - 1e-6) <= reached <= first * (1 + 1e-6)
        for column in range(4):  # no single column has a better code
            for code in range(-2, 2):
                other = solved.codes.clone()
                other[:, column] = code
                assert output_error(other * scale.double() - row.double(), gram) >= reached * (1 - 1e-5)
        relaxed = quantease(row, gram, plain(2)).quantized.decode().double()
        optimal += min(reached, output_error(relaxed - row.double(), gram)) <= float(costs.min()) * (1 + 1e-6)
    assert optimal >= 24


@pytest.mark.parametrize("zeros", [False, True])
def test_quantease_at_three_bits_expect_less_error_than_gptq_in_the_same_order(zeros: bool) -> None:
    for seed in range(3):
        weight, gram = layer(seed)
        quantizer = plain(3, None, zeros)
        rounded, natural, ordered = (
            error(solved.quantized.decode(), weight, gram)
            for solved in (
                rtn(weight, quantizer),
                gptq(weight, gram, quantizer, activation_order=False),
                gptq(weight, gram, quantizer),
            )
        )
        eased = quantease(weight, gram, quantizer).quantized
        polished = quantease(weight, gram, quantizer, Descent("gptq", 10, relax=False)).quantized.decode()
        assert error(eased.decode(), weight, gram) < 0.95 * natural < natural < rounded
        assert error(eased.decode(), weight, gram) < 1.1 * ordered
        assert error(polished, weight, gram) < ordered
        assert all(row.unique().numel() <= 8 for row in eased.codes)


def test_quantease_when_outliers_stay_float_expect_much_less_error_where_they_may_lie_anywhere() -> None:
    for seed in range(3):
        weight, gram = layer(seed)
        bare = {
            zeros: error(quantease(weight, gram, plain(3, None, zeros)).quantized.decode(), weight, gram)
            for zeros in (False, True)
        }
        for zeros in (False, True):
            solved = quantease_outliers(weight, gram, plain(3, None, zeros), OutlierShare(0.01)).quantized
            assert isinstance(solved, SparseTensor)
            assert solved.outliers is not None
            assert error(solved.decode(), weight, gram) < 0.85 * bare[zeros]
            assert solved.outliers.count == round(0.01 * 128 * 128)
            assert all(row.unique().numel() <= 8 for row in solved.codes)
            assert torch.equal(solved.scale.half().float(), solved.scale)
        solved = quantease_outliers(weight, gram, plain(), OutlierShare(0.02, structured=True)).quantized
        assert isinstance(solved, SparseTensor)
        assert solved.outliers is not None
        assert error(solved.decode(), weight, gram) < bare[False]
        kept = solved.outliers.columns.long()
        assert len(kept) == round(0.02 * 128)
        assert not solved.codes[:, kept].any()


def test_quantease_when_hessian_is_diagonal_or_columns_are_dead_expect_rtn(weight: Tensor) -> None:
    diagonal = torch.rand(32, generator=torch.Generator().manual_seed(2), dtype=torch.float64) + 0.1
    diagonal[[3, 17]] = 0
    alive = torch.where(diagonal > 0, weight, torch.zeros_like(weight))
    for quantizer in (plain(4), Quantizer(IntegerGrid(4), 8, ClipSearch()), plain(4, 8, zeros=True)):
        solved = quantease(weight, torch.diag(diagonal), quantizer).quantized
        assert torch.equal(solved.decode(), rtn(alive, quantizer).quantized.decode())


def test_quantease_when_inputs_are_copies_expect_gptq_start_kept_or_bettered(tokens: Tensor, weight: Tensor) -> None:
    tokens[:, 1] = tokens[:, 0]  # a singular Gram matrix: descent needs no inverse
    gram, quantizer = tokens.t() @ tokens, plain(4)
    before = output_error(gptq(weight, invert_hessian(gram), quantizer).quantized.decode() - weight, gram)
    after = quantease(weight, gram, quantizer, Descent("gptq", 3, relax=False)).quantized.decode()
    assert output_error(after - weight, gram) <= before


def test_quantease_outliers_when_start_or_share_makes_no_sense_expect_refusal(tokens: Tensor, weight: Tensor) -> None:
    gram = tokens.t() @ tokens
    with pytest.raises(UsageError, match="starts from float or rtn"):
        quantease_outliers(weight, gram, plain(), OutlierShare(0.01), Descent("gptq"))
    with pytest.raises(UsageError, match="keeps 0 of"):
        quantease_outliers(weight, gram, plain(), OutlierShare(0.001, structured=True))
    with pytest.raises(UsageError, match="between 0 and 1"):
        OutlierShare(1.0)
