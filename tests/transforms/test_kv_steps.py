"""Steps of a quantized cache: positive, fitting, no worse than the plain ones, and robust to what calibration meets."""

import pytest
import torch
from torch import Tensor

from mergequant.ops import kv_layout
from mergequant.transforms import kv_error, kv_steps

TOKENS, HEADS, WIDTH = 600, 3, 10


def drawn(seed: int = 0) -> Tensor:
    """Keys whose channels differ in size by a factor of a thousand."""
    generator = torch.Generator().manual_seed(seed)
    sizes = 10 ** (3 * torch.rand(HEADS, WIDTH, generator=generator) - 1)
    return torch.randn(TOKENS, HEADS, WIDTH, generator=generator) * sizes


def cubes(sample: Tensor, step: Tensor, bits: int) -> Tensor:
    codes = (sample / step).round().clamp(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)
    return (codes * step - sample).abs().pow(3).sum(0)


def test_kv_steps_when_bits_are_8_cover_the_largest_magnitude() -> None:
    sample = drawn()
    torch.testing.assert_close(kv_steps(sample, 8) * 127, sample.abs().amax(0))
    assert int(kv_layout.quantize(sample, kv_steps(sample, 8), 8).abs().max()) == 127


def test_kv_steps_when_bits_are_4_find_the_best_of_a_dense_search() -> None:
    sample = drawn()
    step = kv_steps(sample, 4)
    assert step.shape == (HEADS, WIDTH)
    largest = sample.abs().amax(0) / 7
    best = torch.stack([cubes(sample, largest * part / 400, 4) for part in range(40, 401)]).amin(0)
    assert bool((cubes(sample, step, 4) <= 1.1 * best).all())
    assert bool((cubes(sample, step, 4) <= cubes(sample, largest, 4)).all())
    assert bool((step < largest).any())


@pytest.mark.parametrize("bits", [4, 8])
def test_kv_steps_when_channels_are_scaled_scale_with_them(bits: int) -> None:
    """A power of two: a static step of o_proj in the value projection's rows changes no code of a value."""
    sample = drawn()
    factor = 2.0 ** torch.arange(-15, 15).reshape(HEADS, WIDTH)
    step, scaled = kv_steps(sample, bits), kv_steps(sample * factor, bits)
    assert torch.equal(step * factor, scaled)
    assert torch.equal(kv_layout.quantize(sample, step, bits), kv_layout.quantize(sample * factor, scaled, bits))


@pytest.mark.parametrize("bits", [4, 8])
def test_kv_steps_when_channels_are_dead_or_tiny_stay_usable(bits: int) -> None:
    sample = drawn()
    sample[:, 0, 0] = 0
    sample[:, 1, 1] *= 1e-36
    sample[:, 2, 2] *= 1e30
    step = kv_steps(sample, bits)
    assert step.dtype == torch.float32
    assert bool(((step > 0) & step.isfinite() & step.reciprocal().isfinite()).all())
    assert float(kv_layout.quantize(sample, step, bits)[:, 0, 0].abs().max()) == 0


def test_kv_steps_when_a_token_is_massive_keep_most_of_the_grid_for_the_others() -> None:
    sample = drawn()
    plain = kv_steps(sample, 4)
    sample[0] *= 30
    assert bool((kv_steps(sample, 4) <= sample.abs().amax(0) / 7).all())
    assert float((kv_steps(sample, 4) / plain).median()) < 13  # unclipped: 20 to 30


def test_kv_error_when_bits_grow_falls() -> None:
    sample, held_out = drawn().chunk(2)
    errors = [kv_error(held_out, kv_steps(sample, bits), bits) for bits in (4, 8)]
    assert 0.002 < errors[0] < 0.03
    assert errors[1] < errors[0] / 20
    assert kv_error(sample, torch.full((HEADS, WIDTH), 1e9), 4) == pytest.approx(1)


def test_kv_steps_when_sample_is_half_precision_is_computed_in_float32() -> None:
    sample = drawn().bfloat16()
    assert torch.equal(kv_steps(sample, 4), kv_steps(sample.float(), 4))
