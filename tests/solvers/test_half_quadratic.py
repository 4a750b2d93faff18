"""HQQ: zero points of weights alone."""

import pytest
import torch
from torch import Tensor

from mergequant.errors import UsageError
from mergequant.grids import ZeroTensor
from mergequant.solvers import HalfQuadratic, half_quadratic

START = HalfQuadratic(iterations=0)


def heavy(rows: int = 64, width: int = 128) -> Tensor:
    """Rows with tails, one of one value, one of zeros, one far from 0."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, width, generator=generator) / torch.rand(rows, width, generator=generator).sqrt()
    weight[0], weight[1], weight[2] = 0.5, 0.0, 100 + 0.01 * weight[2]
    return weight


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zeros_when_iterated_expect_less_error_in_every_group(bits: int) -> None:
    weight = heavy()

    def loss(settings: HalfQuadratic) -> Tensor:
        made = half_quadratic(weight, bits, 32, settings).quantized
        return (made.decode() - weight).abs().pow(0.7).reshape(64, 4, 32).sum(-1)

    first, last, fitted = (loss(settings) for settings in (START, HalfQuadratic(), HalfQuadratic(scales=True)))
    assert bool((last <= first * (1 + 1e-5) + 1e-4).all())
    assert float(last[3:].sum()) < 0.97 * float(first[3:].sum())
    assert float(fitted[3:].sum()) < float(last[3:].sum())


def test_zeros_when_found_expect_stored_dtypes_and_nearest_codes() -> None:
    weight = heavy()
    made = half_quadratic(weight, 3, 32).quantized
    assert isinstance(made, ZeroTensor)
    assert (made.codes.dtype, made.scale.dtype, made.zero.dtype) == (torch.int8, torch.float32, torch.float16)
    assert made.scale.shape == made.zero.shape == (64, 4)
    assert made.bits_per_element() == 4 + 48 / 32
    assert not torch.equal(made.zero, made.zero.round())
    scale, zero = (part.float().repeat_interleave(32, 1) for part in (made.scale, made.zero))
    nearest = torch.clamp(torch.round(weight / scale + zero), -4, 3)
    assert float((nearest != made.codes).float().mean()) < 1e-3  # ties
    assert bool(torch.isfinite(made.decode()).all())
    assert not bool(made.decode()[1].any())
    assert torch.allclose(made.decode()[0], weight[0], rtol=0.01)
    assert torch.allclose(made.decode()[2], weight[2], rtol=1e-2)


def test_setting_when_it_makes_no_sense_expect_a_reason() -> None:
    for bad in ({"norm": 0.0}, {"penalty": 0.0}, {"growth": 0.9}, {"iterations": -1}):
        with pytest.raises(UsageError, match="half-quadratic"):
            HalfQuadratic(**bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="group size"):
        half_quadratic(heavy(), 4, 33)
