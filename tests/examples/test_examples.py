"""The examples, run small: each finds what the exact solver finds, and better than rounding."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("scipy")
FOLDER = Path(__file__).parents[2] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_fir_filter_when_order_12_has_4_bits_expect_the_optimum_of_the_exact_solver() -> None:
    fir = load("fir_filter")
    design = fir.LowPass(12, 4)
    problem = design.problem(16 * 12)
    rounded = fir.ripple(design, problem.values(problem.nearest(design.remez())))
    taps = fir.search(design, iterations=20, restarts=8)
    best, proven = fir.exact(design, 10)
    assert proven
    assert rounded == pytest.approx(0.2649, abs=2e-4)
    assert fir.ripple(design, taps) == pytest.approx(0.2071, abs=2e-4)
    assert fir.ripple(design, taps) == pytest.approx(fir.ripple(design, best), abs=1e-6)
    assert (taps[0] * 8).tolist() == [0, 0, 0, -1, 0, 3, 4]


def test_fir_filter_when_rounding_is_optimal_expect_it_kept() -> None:
    fir = load("fir_filter")
    design = fir.LowPass(8, 4)
    assert fir.ripple(design, fir.search(design, iterations=3, restarts=2)) == pytest.approx(0.2071, abs=2e-4)


@pytest.mark.parametrize(("greys", "angles", "noise"), [(2, 8, 0.0), (2, 8, 1.0), (4, 12, 0.2)])
def test_tomography_when_sums_are_noisy_expect_no_worse_ray_than_the_phantoms(
    greys: int, angles: int, noise: float
) -> None:
    tomography = load("discrete_tomography")
    problem = tomography.make_problem(16, angles, greys, noise, seed=0)
    truth = tomography.phantom(16, greys).flatten()[None]
    start = tomography.rounded_least_squares(problem)
    found = tomography.search(problem, start, iterations=4, restarts=4)

    def worst(codes: torch.Tensor) -> float:
        return float(problem.violation(codes).abs().max())

    assert worst(found) <= worst(problem.nearest(truth)) + 1e-9
    assert noise == 0 or worst(found) <= worst(start)
    error = [(problem.values(codes) - truth).abs().mean() for codes in (found, start)]
    assert error[0] <= error[1]


def test_tomography_when_the_image_is_small_expect_the_optimum_of_the_exact_solver() -> None:
    tomography = load("discrete_tomography")
    problem = tomography.make_problem(8, 6, 2, 0.5, seed=1)
    best, proven = tomography.exact(problem, 20)
    assert proven
    found = tomography.search(problem, tomography.rounded_least_squares(problem), iterations=10)
    violation = [float(problem.violation(codes).abs().max()) for codes in (found, best)]
    assert violation[0] == pytest.approx(violation[1], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("fir_filter", ["--order", "8", "--iterations", "2", "--seconds", "5"]),
        ("discrete_tomography", ["--size", "8", "--iterations", "1", "--seconds", "5"]),
    ],
)
def test_main_when_run_small_expect_the_comparison(
    name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    load(name).main()
    printed = capsys.readouterr().out
    assert "min-max search" in printed
    assert "exact (HiGHS)" in printed
    assert "rounded" in printed
