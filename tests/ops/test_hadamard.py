"""Rotations of any width."""

import pytest
import torch

from mergequant import ops
from mergequant.errors import KernelError
from mergequant.ops import hadamard

WIDE = [172, 256, 704, 1408]


@pytest.mark.parametrize("width", [*range(1, 201), *WIDE])
def test_rotation_when_any_width_expect_orthonormal(width: int) -> None:
    matrix = ops.rotation(width).matrix()
    assert matrix.dtype == torch.float64
    assert matrix.shape == (width, width)
    assert float((matrix @ matrix.t() - torch.eye(width, dtype=torch.float64)).abs().max()) < 1e-12


@pytest.mark.parametrize("width", [11008, 14336, 4096])
def test_rotation_when_width_is_that_of_a_large_model_expect_orthonormal_factors(width: int) -> None:
    rotation = ops.rotation(width)
    assert rotation.left.shape[0] * rotation.right.shape[0] == width
    for factor in (rotation.left, rotation.right):
        assert float((factor @ factor.t() - torch.eye(len(factor), dtype=torch.float64)).abs().max()) < 1e-12


@pytest.mark.parametrize("width", [1, 2, 12, 20, 28, 36, 44, 64, 76, 704, 1408, 160, 172, 1376])
def test_rotation_when_a_construction_is_known_expect_plus_and_minus_one(width: int) -> None:
    rotation = ops.rotation(width)
    assert "cosine" not in rotation.name
    signs = rotation.matrix() * width**0.5
    torch.testing.assert_close(signs.abs(), torch.ones_like(signs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prime", [3, 7, 11, 19, 23, 31, 43])
def test_paley_first_when_prime_is_3_mod_4_expect_hadamard_matrix(prime: int) -> None:
    matrix = hadamard._paley_first(prime)
    assert set(matrix.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.t(), (prime + 1) * torch.eye(prime + 1, dtype=torch.float64))


@pytest.mark.parametrize("prime", [5, 13, 17, 29])
def test_paley_second_when_prime_is_1_mod_4_expect_hadamard_matrix(prime: int) -> None:
    matrix = hadamard._paley_second(prime)
    order = 2 * (prime + 1)
    assert set(matrix.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.t(), order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("odd", sorted(hadamard.WILLIAMSON))
def test_williamson_when_sequences_are_in_the_table_expect_hadamard_matrix(odd: int) -> None:
    matrix = hadamard._williamson(odd)
    assert set(matrix.unique().tolist()) == {-1.0, 1.0}
    assert torch.equal(matrix @ matrix.t(), 4 * odd * torch.eye(4 * odd, dtype=torch.float64))


@pytest.mark.parametrize("width", [172, 1376, 11008, 22016])
def test_rotation_when_width_is_43_times_a_power_of_two_expect_williamsons_base(width: int) -> None:
    rotation = ops.rotation(width)
    assert rotation.name == f"williamson-172 x sylvester-{width // 172}"
    assert rotation.is_hadamard


@pytest.mark.parametrize(("width", "inner"), [(1, 1), (64, 16), (172, 1), (704, 16), (704, 4), (1376, 8)])
def test_sign_factors_when_cut_anywhere_expect_the_same_rotation(width: int, inner: int) -> None:
    outer, right = hadamard.sign_factors(width, inner)
    assert outer.dtype == right.dtype == torch.int8
    assert set(torch.cat((outer.flatten(), right.flatten())).tolist()) <= {-1, 1}
    assert torch.equal(right, right.t())
    whole = torch.kron(outer.double(), right.double()) / width**0.5
    torch.testing.assert_close(whole, ops.rotation(width).matrix(), rtol=0, atol=1e-12)


def test_sign_factors_when_there_are_none_expect_error() -> None:
    for width, inner in ((3, 1), (64, 128), (704, 3)):
        with pytest.raises(KernelError, match=f"of order {inner}"):
            hadamard.sign_factors(width, inner)


@pytest.mark.parametrize("width", [1, 2, 3, 14, 40, 52, 172, 256, 704])
@pytest.mark.parametrize("leading", [(5,), (2, 3), (), (0,)])
def test_transform_when_any_width_expect_product_with_the_matrix(width: int, leading: tuple[int, ...]) -> None:
    x = torch.randn(*leading, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = ops.hadamard_transform(x)
    assert turned.dtype == torch.float64
    torch.testing.assert_close(turned, x @ ops.rotation(width).matrix(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_transform_when_input_is_narrow_expect_float32_near_the_exact_result(dtype: torch.dtype) -> None:
    x = torch.randn(7, 704, generator=torch.Generator().manual_seed(0)).to(dtype)
    turned = ops.hadamard_transform(x)
    assert turned.dtype == torch.float32
    torch.testing.assert_close(turned.double(), x.double() @ ops.rotation(704).matrix(), rtol=0, atol=1e-5)


def test_transform_when_both_input_and_weight_turn_expect_same_product() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 52, generator=generator, dtype=torch.float64)
    weight = torch.randn(9, 52, generator=generator, dtype=torch.float64)
    turned = ops.hadamard_transform(x) @ ops.hadamard_transform(weight).t()
    torch.testing.assert_close(turned, x @ weight.t(), rtol=0, atol=1e-12)
    assert float((ops.hadamard_transform(x) - x).abs().max()) > 0.1


def test_transform_when_one_channel_is_an_outlier_expect_it_spread_evenly() -> None:
    x = torch.zeros(1, 704)
    x[0, 3] = 704**0.5
    assert float(ops.hadamard_transform(x).abs().max()) == pytest.approx(1.0, rel=1e-5)


def test_rotation_when_built_under_another_default_device_expect_it_on_the_cpu() -> None:
    hadamard.rotation.cache_clear()
    with torch.device("meta"):
        rotation = ops.rotation(24)
    assert rotation.left.device.type == "cpu"
    assert float(rotation.matrix().abs().sum()) > 1


def test_rotation_when_asked_twice_expect_the_same_name_and_values() -> None:
    first = ops.rotation(44)
    hadamard.rotation.cache_clear()
    again = ops.rotation(44)
    assert first.name == again.name == "paley1-44 x sylvester-1"
    assert torch.equal(first.matrix(), again.matrix())


def test_transform_when_input_is_wrong_expect_error() -> None:
    with pytest.raises(KernelError, match="x is"):
        ops.hadamard_transform(torch.ones(2, 4, dtype=torch.int8))
    with pytest.raises(KernelError, match="width 0"):
        ops.rotation(0)
