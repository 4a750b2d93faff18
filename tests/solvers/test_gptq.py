"""GPTQ and the sweep (GPTQ digest, "How to know it works")."""

import itertools

import pytest
import torch
from torch import Tensor

from mergequant.errors import NumericsError, UsageError
from mergequant.grids import AbsMax, ClipSearch, IntegerGrid, Quantizer
from mergequant.solvers import GramSum, gptq, invert_hessian, output_error, rtn, sweep


def plain(bits: int = 4, group_size: int | None = None) -> Quantizer:
    return Quantizer(IntegerGrid(bits), group_size, AbsMax())


def error_of(solution: Tensor, weight: Tensor, hessian: Tensor) -> float:
    return output_error(solution - weight, hessian)


@pytest.mark.parametrize("activation_order", [False, True])
@pytest.mark.parametrize("search", [AbsMax(), ClipSearch()])
@pytest.mark.parametrize("group_size", [None, 8])
def test_gptq_when_hessian_is_diagonal_expect_rtn_exactly(
    weight: Tensor, activation_order: bool, search: AbsMax | ClipSearch, group_size: int | None
) -> None:
    diagonal = torch.rand(32, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 100 + 0.1
    quantizer = Quantizer(IntegerGrid(4), group_size, search)
    solved = gptq(weight, torch.diag(diagonal), quantizer, activation_order=activation_order).quantized
    rounded = rtn(weight, quantizer).quantized
    assert torch.equal(solved.codes, rounded.codes)
    assert torch.equal(solved.scale, rounded.scale)
    assert solved.codes.unique().numel() >= 14


@pytest.mark.parametrize(("bits", "gain"), [(4, 1.3), (3, 2.0), (2, 2.0)])
def test_gptq_when_inputs_are_correlated_expect_much_less_output_error_than_rtn(
    tokens: Tensor, weight: Tensor, bits: int, gain: float
) -> None:
    hessian = tokens.t() @ tokens
    search = Quantizer(IntegerGrid(bits), None, ClipSearch())
    rounded = error_of(rtn(weight, search).quantized.decode(), weight, hessian)
    ordered, natural = (
        error_of(gptq(weight, hessian, search, activation_order=order).quantized.decode(), weight, hessian)
        for order in (True, False)
    )
    assert gain * ordered < rounded
    assert 1.3 * natural < rounded
    assert ordered < natural


@pytest.mark.parametrize("block", [1, 5, 8, 31, 128])
@pytest.mark.parametrize("activation_order", [False, True])
def test_gptq_when_blocked_expect_same_codes_as_one_block(
    tokens: Tensor, weight: Tensor, block: int, activation_order: bool
) -> None:
    inverse = invert_hessian(tokens.t() @ tokens, activation_order=activation_order)
    whole = gptq(weight, inverse, plain(), block=32).quantized
    blocked = gptq(weight, inverse, plain(), block=block).quantized
    # Rounding differs by an ulp, which may turn a tie: a few codes at most.
    assert int((whole.codes != blocked.codes).sum()) <= 2
    assert torch.equal(whole.scale, blocked.scale)


def test_sweep_when_nothing_is_rounded_finely_expect_reference_implementation(tokens: Tensor, weight: Tensor) -> None:
    """Written out from the paper with explicit inverses, in float64: the sweep must take the same decisions."""
    hessian = tokens.t() @ tokens
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    scale = weight.double().abs().amax(1) / 7
    left, values, expected = hessian.clone(), weight.double().clone(), torch.zeros(24, 32, dtype=torch.float64)
    for column in range(32):
        inverse = torch.linalg.inv(left[column:, column:])
        expected[:, column] = (values[:, column] / scale).round().clamp(-8, 7)
        error = (values[:, column] - expected[:, column] * scale) / inverse[0, 0]
        values[:, column:] -= error[:, None] * inverse[0]
    solved = gptq(weight, tokens.t() @ tokens, plain(), activation_order=False).quantized
    assert int((solved.codes.double() != expected).sum()) <= 2


def test_gptq_when_four_columns_expect_error_between_the_optimum_and_rtn() -> None:
    generator = torch.Generator().manual_seed(3)
    better = worse = 0
    for _ in range(40):
        x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
        x += 2 * torch.randn(50, 1, generator=generator, dtype=torch.float64)
        hessian, row = x.t() @ x, torch.randn(1, 4, generator=generator)
        scale = rtn(row, plain(2)).quantized.scale
        candidates = torch.tensor(list(itertools.product(range(-2, 2), repeat=4)), dtype=torch.float64) * scale.double()
        difference = candidates - row.double()
        best = float(((difference @ hessian) * difference).sum(1).min())
        solved = error_of(gptq(row, hessian, plain(2), damping=1e-6).quantized.decode(), row, hessian)
        rounded = error_of(rtn(row, plain(2)).quantized.decode(), row, hessian)
        assert best <= solved * (1 + 1e-6)
        better += solved < rounded * (1 - 1e-6)
        worse += solved > rounded * (1 + 1e-6)  # greedy: not better every time
    assert better >= 12
    assert better >= 4 * worse


def test_gptq_when_columns_are_permuted_expect_act_order_codes_permuted_back(tokens: Tensor, weight: Tensor) -> None:
    hessian = tokens.t() @ tokens
    permutation = torch.randperm(32, generator=torch.Generator().manual_seed(5))
    straight = gptq(weight, hessian, plain()).quantized
    shuffled = gptq(weight[:, permutation], hessian[permutation][:, permutation], plain()).quantized
    assert torch.equal(shuffled.codes, straight.codes[:, permutation])
    inverse = invert_hessian(hessian)
    diagonal = hessian.diagonal()[inverse.order]
    assert bool((diagonal[:-1] >= diagonal[1:]).all())
    assert inverse.order.tolist() != list(range(32))


def test_gptq_when_hessian_is_scaled_expect_same_codes_even_with_dead_columns(tokens: Tensor, weight: Tensor) -> None:
    tokens[:, [3, 17, 18]] = 0
    hessian = tokens.t() @ tokens
    solutions = [gptq(weight, hessian * factor, plain()).quantized.codes for factor in (1.0, 2.0**-40, 2.0**30)]
    assert torch.equal(solutions[0], solutions[1])
    assert torch.equal(solutions[0], solutions[2])


def test_gptq_when_columns_are_dead_expect_zero_codes_and_ranges_without_them(tokens: Tensor, weight: Tensor) -> None:
    tokens[:, [0, 9]] = 0
    weight[:, 9] = 1000  # must not stretch the scales of the rows
    solved = gptq(weight, tokens.t() @ tokens, plain())
    assert not solved.quantized.codes[:, [0, 9]].any()
    alive = [column for column in range(32) if column not in (0, 9)]
    assert torch.equal(solved.quantized.scale[:, 0], weight[:, alive].abs().amax(1) / 7)
    inverse = invert_hessian(tokens.t() @ tokens)
    assert inverse.dead.nonzero().flatten().tolist() == [0, 9]


def test_gptq_when_all_columns_are_dead_expect_zeros(weight: Tensor) -> None:
    solved = gptq(weight, torch.zeros(32, 32, dtype=torch.float64), plain())
    assert not solved.quantized.codes.any()
    assert bool(torch.isfinite(solved.quantized.decode()).all())


def test_groups_when_static_with_act_order_expect_scales_of_the_original_groups(tokens: Tensor, weight: Tensor) -> None:
    quantizer = plain(4, 8)
    solved = gptq(weight, tokens.t() @ tokens, quantizer, activation_order=True).quantized
    assert torch.equal(solved.scale, weight.reshape(24, 4, 8).abs().amax(-1) / 7)
    whole = gptq(weight, tokens.t() @ tokens, plain()).quantized.decode()
    hessian = tokens.t() @ tokens
    assert error_of(solved.decode(), weight, hessian) < error_of(whole, weight, hessian)


def test_groups_when_dynamic_expect_scales_that_cover_the_compensated_weights(tokens: Tensor, weight: Tensor) -> None:
    hessian = tokens.t() @ tokens
    quantizer = plain(4, 8)
    solved = gptq(weight, hessian, quantizer, activation_order=False, static_groups=False, block=16).quantized
    first = weight[:, :8].abs().amax(1) / 7
    assert torch.equal(solved.scale[:, 0], first)  # nothing has been compensated yet
    assert not torch.allclose(solved.scale[:, 1:], (weight.reshape(24, 4, 8).abs().amax(-1) / 7)[:, 1:], rtol=1e-3)
    other = gptq(weight, hessian, quantizer, activation_order=False, static_groups=False, block=1).quantized
    assert int((other.codes != solved.codes).sum()) <= 2
    rounded = rtn(weight, quantizer).quantized.decode()
    assert error_of(solved.decode(), weight, hessian) < error_of(rounded, weight, hessian)


def test_groups_when_dynamic_with_act_order_or_of_uneven_size_expect_error(tokens: Tensor, weight: Tensor) -> None:
    hessian = tokens.t() @ tokens
    with pytest.raises(UsageError, match="activation_order=False"):
        gptq(weight, hessian, plain(4, 8), activation_order=True, static_groups=False)
    with pytest.raises(UsageError, match="does not divide"):
        gptq(weight, hessian, plain(4, 7))


def test_invert_hessian_when_positive_definite_expect_factor_of_the_damped_inverse(tokens: Tensor) -> None:
    hessian = tokens.t() @ tokens
    result = invert_hessian(hessian, damping=0.02)
    assert (result.damping, result.attempts) == (0.02, 1)
    damped = hessian + 0.02 * hessian.diagonal().mean() * torch.eye(32, dtype=torch.float64)
    damped = damped[result.order][:, result.order]
    factor = result.factor.double()
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.t() @ factor @ damped, torch.eye(32, dtype=torch.float64), rtol=0, atol=1e-4)


def test_invert_hessian_when_singular_without_damping_expect_it_raised_and_reported() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([x, -x], 1)  # exact copies, as a split channel makes them
    result = invert_hessian(x.t() @ x, damping=0.0)
    assert result.attempts > 1
    assert result.damping > 0
    assert bool(torch.isfinite(result.factor).all())
    indefinite = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    result = invert_hessian(indefinite, damping=0.01)
    assert result.damping > 2  # eigenvalues 4 and -2: less cannot do
    assert result.attempts > 3


def test_solution_when_damping_was_raised_expect_it_reported(weight: Tensor) -> None:
    x = torch.ones(9, 32, dtype=torch.float64)
    solved = gptq(weight, x.t() @ x, plain(), damping=0.0)
    assert solved.damping > 0
    assert solved.attempts > 1
    assert (rtn(weight, plain()).damping, rtn(weight, plain()).attempts) == (0.0, 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_invert_hessian_when_not_finite_expect_error_that_names_the_channel(tokens: Tensor, value: float) -> None:
    hessian = tokens.t() @ tokens
    hessian[7, 7] = value
    with pytest.raises(NumericsError, match="channel 7"):
        invert_hessian(hessian)


def test_invert_hessian_when_hopeless_expect_error() -> None:
    with pytest.raises(NumericsError, match="not positive definite"):
        invert_hessian(torch.tensor([[1.0, 1e9], [1e9, 1.0]]))


def test_invert_hessian_when_called_expect_hessian_untouched(tokens: Tensor) -> None:
    tokens[:, 3] = 0
    hessian = tokens.t() @ tokens
    before = hessian.clone()
    invert_hessian(hessian)
    assert torch.equal(hessian, before)


@pytest.mark.parametrize("activation_order", [False, True])
def test_sweep_when_called_expect_every_original_column_once_in_order(
    tokens: Tensor, weight: Tensor, activation_order: bool
) -> None:
    inverse = invert_hessian(tokens.t() @ tokens, activation_order=activation_order)
    seen: list[int] = []
    before = weight.clone()

    def keep(column: int, values: Tensor) -> Tensor:
        seen.append(column)
        assert values.shape == (24,)
        return values

    result, loss = sweep(weight, inverse, keep, block=5)
    assert seen == inverse.order.tolist()
    assert torch.equal(weight, before)
    assert torch.equal(result, weight)  # no error, so nothing is compensated
    assert not loss.any()


def test_sweep_when_one_column_is_dropped_expect_the_others_to_compensate_by_least_squares(tokens: Tensor) -> None:
    """Setting the first column to zero moves the rest where least squares would put them."""
    hessian = tokens.t() @ tokens
    row = torch.randn(1, 32, generator=torch.Generator().manual_seed(4))
    inverse = invert_hessian(hessian, damping=0.0, activation_order=False)
    result, loss = sweep(row, inverse, lambda column, values: torch.zeros_like(values) if column == 0 else values)
    wanted = row.double() @ hessian[:, 1:]
    expected = torch.linalg.solve(hessian[1:, 1:], wanted.t()).t()
    torch.testing.assert_close(result[:, 1:].double(), expected, rtol=1e-4, atol=1e-4)
    difference = result.double() - row.double()
    assert float(loss) == pytest.approx(float(((difference @ hessian) * difference).sum()) / 2, rel=1e-3)


def test_sweep_when_groups_begin_expect_hook_with_compensated_columns_before_their_first(
    tokens: Tensor, weight: Tensor
) -> None:
    inverse = invert_hessian(tokens.t() @ tokens, activation_order=False)
    events: list[tuple[str, int]] = []
    pieces: dict[int, Tensor] = {}

    def hook(position: int, values: Tensor) -> None:
        events.append(("group", position))
        pieces[position] = values.clone()

    def quantize(column: int, values: Tensor) -> Tensor:
        events.append(("column", column))
        if column % 8 == 0:
            assert torch.equal(values, pieces[column][:, 0])
        return values.round()

    sweep(weight, inverse, quantize, begin_group=hook, group_size=8, block=16)
    expected = []
    for column in range(32):
        expected += [("group", column)] if column % 8 == 0 else []
        expected.append(("column", column))
    assert events == expected
    assert all(piece.shape == (24, 8) for piece in pieces.values())
    assert torch.equal(pieces[0], weight[:, :8])
    assert not torch.equal(pieces[8], weight[:, 8:16])


def test_sweep_when_groups_do_not_fit_blocks_expect_error(tokens: Tensor, weight: Tensor) -> None:
    inverse = invert_hessian(tokens.t() @ tokens)
    with pytest.raises(UsageError, match="tears groups"):
        sweep(weight, inverse, lambda _, values: values, begin_group=lambda *_: None, group_size=7, block=16)


def test_gram_sum_when_tokens_come_in_pieces_expect_one_sum_and_count(tokens: Tensor) -> None:
    codes = (tokens * 3).round().clamp(-8, 7).float()
    gram = GramSum.zeros(32, 32, torch.device("cpu"))
    for piece in codes.split(77):
        gram.add(piece)
    assert gram.tokens == 400
    assert torch.equal(gram.total, codes.double().t() @ codes.double())  # exact for integers
    cross = GramSum.zeros(32, 5, torch.device("cpu"))
    cross.add(codes, codes[:, :5])
    assert torch.equal(cross.total, gram.total[:, :5])


def test_output_error_when_weights_differ_expect_squared_error_on_the_tokens(tokens: Tensor, weight: Tensor) -> None:
    difference = weight.double() * 0.1
    expected = float((tokens @ difference.t()).square().sum())
    assert output_error(difference, tokens.t() @ tokens) == pytest.approx(expected, rel=1e-10)
