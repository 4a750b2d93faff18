"""FIR filters whose coefficients have few bits: the smallest ripple that fixed-point numbers allow.

    python examples/fir_filter.py --order 12 --bits 4

The ripple of a linear-phase filter is the largest distance between its response and the wanted one, so that finding
its coefficients is a discrete min-max violation problem (arXiv 2508.13437, section on filters): A holds cosines at the
frequencies of both bands, b the wanted response, and the levels are k / 2^(bits-1). Compared: the best filter over the
reals (Remez) rounded to the levels, the search of `mergequant.solvers.min_max_search` from there, and the exact optimum
of the mixed-integer program (HiGHS), where that ends in time. Needs SciPy: pip install 'mergequant[examples]'.
"""

import argparse
import time
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.signal import remez
from torch import Tensor

from mergequant.solvers import MinMaxProblem, MinMaxSearch, min_max_search

DENSITY = 16  # frequencies of the design, per order
FINE = 16384  # frequencies that the final ripple is measured on


@dataclass(frozen=True)
class LowPass:
    """A low-pass filter: wanted response 1 up to `passes`, 0 from `stops` on, in units of the Nyquist frequency.

    Attributes:
        order: even; the filter has order + 1 taps, order / 2 + 1 of them free.
        bits: of a coefficient: k / 2^(bits-1), k from -2^(bits-1) to 2^(bits-1) - 1.
    """

    order: int = 12
    bits: int = 4
    passes: float = 0.4
    stops: float = 4 / 7

    def problem(self, points: int) -> MinMaxProblem:
        """The min-max problem on about `points` frequencies."""
        middle = self.order // 2
        share = self.passes / (self.passes + 1 - self.stops)
        count = max(round(points * share), 2)
        bands = [(0.0, self.passes, count), (self.stops, 1.0, max(points - count, 2))]
        frequency = torch.cat([torch.linspace(low, high, own, dtype=torch.float64) for low, high, own in bands])
        cosines = 2 * torch.cos(torch.pi * frequency[:, None] * (middle - torch.arange(middle)))
        wanted = (frequency <= self.passes).double()
        steps = 1 << (self.bits - 1)
        levels = torch.arange(-steps, steps, dtype=torch.float64) / steps
        matrix = torch.cat((cosines, torch.ones_like(cosines[:, :1])), 1)
        return MinMaxProblem(matrix, wanted[None], levels[None, None])

    def remez(self) -> Tensor:
        """The free taps of the best filter over the reals, float64 (1, order / 2 + 1)."""
        taps = remez(self.order + 1, [0, self.passes, self.stops, 1], [1, 0], fs=2, grid_density=64)
        return torch.from_numpy(taps[: self.order // 2 + 1].copy())[None]


def ripple(design: LowPass, taps: Tensor) -> float:
    """Largest distance from the wanted response over a fine set of frequencies; taps (1, order / 2 + 1)."""
    fine = design.problem(FINE)
    return float((taps @ fine.matrix.t() - fine.target).abs().max())


def search(design: LowPass, iterations: int = 20, restarts: int = 32, seed: int = 0) -> Tensor:
    """Taps (1, order / 2 + 1) found from the rounded Remez filter: `restarts` searches, as rows of one problem."""
    problem = design.problem(DENSITY * design.order)
    many = MinMaxProblem(problem.matrix, problem.target.expand(restarts, -1), problem.levels)
    start = problem.nearest(design.remez()).expand(restarts, -1)
    settings = MinMaxSearch("swap_and_single", guard=False, iterations=iterations, rate=0.3, seed=seed, tolerance=1e-9)
    found = min_max_search(many, start, settings)
    best = int(found.worst.argmin())
    return many.values(found.codes)[best][None]


def exact(design: LowPass, seconds: float = 20.0) -> tuple[Tensor | None, bool]:
    """The mixed-integer program min t, -t <= A x - b <= t: best taps found, and whether they are proven optimal."""
    problem = design.problem(DENSITY * design.order)
    matrix, target = problem.matrix.numpy(), problem.target[0].numpy()
    steps = 1 << (design.bits - 1)
    ones = np.ones((len(matrix), 1))
    bands = LinearConstraint(
        np.block([[matrix / steps, -ones], [matrix / steps, ones]]),
        np.concatenate((np.full(len(matrix), -np.inf), target)),
        np.concatenate((target, np.full(len(matrix), np.inf))),
    )
    variables = matrix.shape[1]
    result = milp(
        np.append(np.zeros(variables), 1.0),
        integrality=np.append(np.ones(variables), 0),
        bounds=Bounds(np.append(np.full(variables, -steps), 0), np.append(np.full(variables, steps - 1), np.inf)),
        constraints=bands,
        options={"time_limit": seconds},
    )
    if result.x is None:
        return None, False
    return torch.from_numpy(np.round(result.x[:-1]) / steps)[None], result.status == 0


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--order", type=int, default=12, help="even; the filter has one tap more")
    parser.add_argument("--bits", type=int, default=4, help="of a coefficient")
    parser.add_argument("--passes", type=float, default=0.4, help="end of the pass band, 1 = Nyquist")
    parser.add_argument("--stops", type=float, default=4 / 7, help="begin of the stop band")
    parser.add_argument("--iterations", type=int, default=20, help="of the large neighbourhood search")
    parser.add_argument("--seconds", type=float, default=20.0, help="limit of the exact solver; 0 leaves it out")
    args = parser.parse_args()
    if args.order < 2 or args.order % 2 or args.bits < 2 or not 0 < args.passes < args.stops < 1:
        parser.error("order must be even, bits at least 2, and 0 < passes < stops < 1")
    design = LowPass(args.order, args.bits, args.passes, args.stops)
    real, problem = design.remez(), design.problem(DENSITY * args.order)
    scale = 1 << (args.bits - 1)
    print(f"low pass, order {args.order}, {args.bits} bits; ripple on {FINE} frequencies")
    rounded = problem.values(problem.nearest(real))
    began = time.perf_counter()
    rows = {"Remez, real numbers": (real, ""), "Remez, rounded": (rounded, "")}
    rows["min-max search"] = (search(design, args.iterations), f"{time.perf_counter() - began:.1f} s")
    if args.seconds:
        began = time.perf_counter()
        taps, proven = exact(design, args.seconds)
        if taps is not None:
            word = "optimal" if proven else "not proven optimal"
            rows["exact (HiGHS)"] = (taps, f"{time.perf_counter() - began:.1f} s, {word}")
    for name, (taps, note) in rows.items():
        print(f"  {name:20s} {ripple(design, taps):.4f}   {note}")
    found = (rows["min-max search"][0][0] * scale).round().int().tolist()
    print(f"  taps of the search, times {scale}: {found}")


if __name__ == "__main__":
    main()
