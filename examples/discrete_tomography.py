"""Discrete tomography: an image of a few known grey levels, from sums along rays that are known within a bound.

    python examples/discrete_tomography.py --size 16 --angles 8 --noise 1

With uniform noise every sum is known to within the same bound, so that the image whose worst ray is best is the one to
look for: a discrete min-max violation problem (arXiv 2508.13437, section on tomography). A holds the length, in
pixels, that a pixel has in a ray of a parallel beam, b the noisy sums, and the levels are the greys. Compared: least
squares over the reals rounded to the nearest grey, the search of `mergequant.solvers.min_max_search` from there, and
the exact mixed-integer program (HiGHS) within a time limit. Needs SciPy: pip install 'mergequant[examples]'.
"""

import argparse
import time

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from mergequant.solvers import MinMaxProblem, MinMaxSearch, min_max_search

STEPS = 500  # of least squares
GREYS = {2: (0.0, 1.0), 4: (0.0, 1 / 3, 2 / 3, 1.0)}


def phantom(size: int, greys: int = 2) -> Tensor:
    """Ellipses inside each other, of the known greys: float64 (size, size)."""
    place = (torch.arange(size, dtype=torch.float64) + 0.5) / size * 2 - 1
    y, x = place[:, None], place[None]
    image = torch.zeros(size, size, dtype=torch.float64)
    image[(x / 0.75) ** 2 + (y / 0.9) ** 2 < 1] = 1.0
    image[((x + 0.25) / 0.25) ** 2 + ((y - 0.1) / 0.4) ** 2 < 1] = 0.0
    image[((x - 0.3) / 0.22) ** 2 + ((y + 0.3) / 0.25) ** 2 < 1] = GREYS[greys][1] if greys > 2 else 0.0
    image[(x - 0.25).abs() + (y - 0.4).abs() < 0.25] = GREYS[greys][2] if greys > 2 else 0.0
    return image


def projections(size: int, angles: int) -> Tensor:
    """A of a parallel beam, float64 (angles * size, pixels): pixels are shared by the two rays that they lie between.

    Rays that no pixel meets are left out.
    """
    place = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    rows = []
    for number in range(angles):
        angle = torch.tensor(torch.pi * number / angles, dtype=torch.float64)
        detector = (place[None] * torch.cos(angle) + place[:, None] * torch.sin(angle)).flatten() + (size - 1) / 2
        rays = torch.arange(size, dtype=torch.float64)[:, None]
        rows.append((1 - (detector[None] - rays).abs()).clamp_min(0))
    matrix = torch.cat(rows)
    return matrix[matrix.sum(1) > 0]


def make_problem(size: int, angles: int, greys: int, noise: float, seed: int) -> MinMaxProblem:
    """The min-max problem of the phantom's sums with uniform noise of up to `noise` pixels."""
    matrix = projections(size, angles)
    generator = torch.Generator().manual_seed(seed)
    error = (2 * torch.rand(len(matrix), generator=generator, dtype=torch.float64) - 1) * noise
    target = matrix @ phantom(size, greys).flatten() + error
    return MinMaxProblem(matrix, target[None], torch.tensor(GREYS[greys], dtype=torch.float64)[None, None])


def rounded_least_squares(problem: MinMaxProblem) -> Tensor:
    """Codes (1, pixels) of the least-squares image within the range of the greys, rounded to the nearest ones.

    Projected gradient descent with Nesterov's momentum, from a mean grey.
    """
    matrix, low, high = problem.matrix, problem.levels.min(), problem.levels.max()
    rate = 1 / torch.linalg.matrix_norm(matrix, 2).square()
    image = ahead = torch.full_like(problem.target[:, :1], float(low + high) / 2).repeat(1, matrix.shape[1])
    for step in range(STEPS):
        last, image = image, (ahead - rate * ((ahead @ matrix.t() - problem.target) @ matrix)).clamp(low, high)
        ahead = image + step / (step + 3) * (image - last)
    return problem.nearest(image)


def search(problem: MinMaxProblem, start: Tensor, iterations: int = 10, restarts: int = 8, seed: int = 0) -> Tensor:
    """Codes (1, pixels) found by `restarts` searches from one start, as rows of one problem."""
    many = MinMaxProblem(problem.matrix, problem.target.expand(restarts, -1), problem.levels)
    settings = MinMaxSearch("swap_and_single", guard=False, iterations=iterations, rate=0.02, candidates=64, seed=seed)
    found = min_max_search(many, start.expand(restarts, -1), settings)
    return found.codes[int(found.worst.argmin())][None]


def exact(problem: MinMaxProblem, seconds: float = 20.0) -> tuple[Tensor | None, bool]:
    """The mixed-integer program min t, -t <= A x - b <= t over even levels: best codes found, and whether they are
    proven optimal."""
    matrix, target = problem.matrix.numpy(), problem.target[0].numpy()
    low, step = float(problem.levels[0, 0, 0]), float(problem.levels[0, 0, 1] - problem.levels[0, 0, 0])
    base, ones = low * matrix.sum(1), np.ones((len(matrix), 1))
    rays = LinearConstraint(
        np.block([[matrix * step, -ones], [matrix * step, ones]]),
        np.concatenate((np.full(len(matrix), -np.inf), target - base)),
        np.concatenate((target - base, np.full(len(matrix), np.inf))),
    )
    pixels, top = matrix.shape[1], problem.levels.shape[-1] - 1
    result = milp(
        np.append(np.zeros(pixels), 1.0),
        integrality=np.append(np.ones(pixels), 0),
        bounds=Bounds(np.zeros(pixels + 1), np.append(np.full(pixels, top), np.inf)),
        constraints=rays,
        options={"time_limit": seconds},
    )
    if result.x is None:
        return None, False
    return torch.from_numpy(np.round(result.x[:-1])).long()[None], result.status == 0


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=16, help="pixels along a side")
    parser.add_argument("--angles", type=int, default=8, help="of the beam, over half a turn")
    parser.add_argument("--greys", type=int, default=2, choices=sorted(GREYS), help="known grey levels")
    parser.add_argument("--noise", type=float, default=1.0, help="bound of the uniform error of a sum, in pixels")
    parser.add_argument("--iterations", type=int, default=10, help="of the large neighbourhood search")
    parser.add_argument("--seconds", type=float, default=20.0, help="limit of the exact solver; 0 leaves it out")
    parser.add_argument("--seed", type=int, default=0, help="of the noise and of the search")
    args = parser.parse_args()
    if args.size < 4 or args.angles < 1 or args.noise < 0:
        parser.error("size must be at least 4, angles at least 1, noise not negative")
    problem = make_problem(args.size, args.angles, args.greys, args.noise, args.seed)
    truth = phantom(args.size, args.greys).flatten()
    print(f"{args.size} x {args.size} pixels, {args.greys} greys, {len(problem.matrix)} rays, noise {args.noise}")
    began = time.perf_counter()
    start = rounded_least_squares(problem)
    rows = {"phantom": (problem.nearest(truth[None]), ""), "least squares, rounded": (start, "")}
    found = search(problem, start, args.iterations, seed=args.seed)
    rows["min-max search"] = (found, f"{time.perf_counter() - began:.1f} s")
    if args.seconds:
        began = time.perf_counter()
        codes, proven = exact(problem, args.seconds)
        if codes is not None:
            word = "optimal" if proven else "not proven optimal"
            rows["exact (HiGHS)"] = (codes, f"{time.perf_counter() - began:.1f} s, {word}")
    print(f"  {'':24s}{'worst ray':>10s}{'mean error':>12s}")
    for name, (codes, note) in rows.items():
        error = float((problem.values(codes)[0] - truth).abs().mean())
        print(f"  {name:24s}{float(problem.violation(codes).abs().max()):10.3f}{error:12.4f}   {note}")
    print(
        "\n".join("  " + "".join(" .:#"[pixel * 3 // (args.greys - 1)] * 2 for pixel in row) for row in _square(found))
    )


def _square(codes: Tensor) -> list[list[int]]:
    side = round(codes.shape[1] ** 0.5)
    rows: list[list[int]] = codes.reshape(side, side).tolist()
    return rows


if __name__ == "__main__":
    main()
