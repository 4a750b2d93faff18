"""Orthonormal rotations of any width, built and never typed out: base (x) Sylvester.

The base is a Hadamard matrix of Paley's first or second kind where one of the width's divisors allows it, else one of
Williamson's kind (order 172, for the 11008 channels of Llama-2-7B), else the orthonormal cosine matrix of the odd
divisor, which is a rotation too but not of plus and minus ones. The name of the construction is stored with a
checkpoint, so that a later release cannot silently rotate differently: one that gives a width another base refuses
older checkpoints of that width.
Sources: Sylvester 1867; Paley 1933 (quadratic residues modulo a prime q give order q+1 for q = 3 mod 4 and 2(q+1) for
q = 1 mod 4); Williamson 1944 (four symmetric circulants A, B, C, D of order n with A^2 + B^2 + C^2 + D^2 = 4n I).
"""

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from mergequant.errors import KernelError
from mergequant.ops._register import register_op
from mergequant.ops._validate import require_float

__all__ = ["Rotation", "hadamard_transform", "rotation"]

LARGEST_BASE = 512  # larger base matrices cost more than they bring
LARGEST_FACTOR = 64  # Sylvester part applied as one small matrix product

# First halves of the first rows of Williamson's circulants, entries 0..(n-1)/2; the other half mirrors them. For n = 43
# they are constant on the cosets of {1, 6, 7, -1, -6, -7}, which leaves 2^7 rows to try for each of the four.
WILLIAMSON = {
    43: ("+++++-++----+-++--++-+", "+++---++--+-+-+-++----", "++-+-++++-+--+--+++--+", "+-++-----++++-+-+++-++"),
}


@dataclass(frozen=True)
class Rotation:
    """R = left (x) right: x R = left^T X right, with X = x reshaped to (left, right).

    Attributes:
        name: construction, for example "paley1-44 x sylvester-32".
        left: float64 orthonormal (a, a).
        right: float64 orthonormal (b, b).
        base: float64 orthonormal (c, c): R = base (x) Sylvester of order `power`, however it is cut into two factors.
        power: a * b / c, a power of two.
    """

    name: str
    left: Tensor
    right: Tensor
    base: Tensor
    power: int

    @property
    def is_hadamard(self) -> bool:
        """Whether all entries are plus or minus 1 / sqrt(width)."""
        return not self.name.startswith("cosine")

    def matrix(self) -> Tensor:
        """The whole rotation, float64 (a * b, a * b)."""
        return torch.kron(self.left, self.right)


@cache
def rotation(width: int) -> Rotation:
    """The rotation of a width. Hadamard wherever a construction is known here, else with a cosine base.

    Raises:
        KernelError: a width below 1.
    """
    if width < 1:
        raise KernelError(f"no rotation of width {width}")
    with torch.device("cpu"):  # the cache must not keep what a caller builds under `torch.device("meta")`
        name, base = _base(width)
        power = width // base.shape[0]
        inner = min(power, LARGEST_FACTOR)
        left = torch.kron(base, _sylvester(power // inner))
        return Rotation(f"{name} x sylvester-{power}", left, _sylvester(inner), base, power)


def sign_factors(width: int, inner: int) -> tuple[Tensor, Tensor]:
    """A Hadamard rotation as integers: x R = outer^T X inner / sqrt(width), with X = x reshaped to (-1, inner).

    Args:
        width: one whose rotation `is_hadamard`.
        inner: order of the Sylvester matrix on the right; a power of two that divides the rotation's `power`.

    Returns:
        int8 matrices of plus and minus ones: outer (width / inner, width / inner), inner (inner, inner), symmetric.

    Raises:
        KernelError: no such factors.
    """
    built = rotation(width)
    if not built.is_hadamard or built.power % inner:
        raise KernelError(f"the rotation {built.name} of width {width} has no factor of signs of order {inner}")
    with torch.device("cpu"):
        base = built.base * math.sqrt(built.base.shape[0])
        rest = built.power // inner
        outer = torch.kron(base, _sylvester(rest) * math.sqrt(rest))
        return outer.round().to(torch.int8), (_sylvester(inner) * math.sqrt(inner)).round().to(torch.int8)


@register_op
def hadamard_transform(x: Tensor) -> Tensor:
    """Rotate the last axis of x (..., width) by `rotation(width)`, in float32 (float64 stays float64).

    Raises:
        KernelError: x is not a float tensor.
    """
    require_float("hadamard_transform", "x", x)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    left, right = _factors(x.shape[-1], str(x.device), dtype)
    grid = x.to(dtype).reshape(-1, left.shape[0], right.shape[0])
    return torch.matmul(left.t(), grid @ right).reshape(x.shape)


@hadamard_transform.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


@cache
def _factors(width: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    built = rotation(width)
    return built.left.to(device=device, dtype=dtype), built.right.to(device=device, dtype=dtype)


def _base(width: int) -> tuple[str, Tensor]:
    odd = width
    while odd % 2 == 0:
        odd //= 2
    if odd == 1:
        return "sylvester-1", torch.ones(1, 1, dtype=torch.float64)
    order = odd
    while width % order == 0 and order <= LARGEST_BASE:
        if order % 4 == 0 and _is_prime(order - 1) and (order - 1) % 4 == 3:
            return f"paley1-{order}", _paley_first(order - 1) / math.sqrt(order)
        if order % 4 == 0 and _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
            return f"paley2-{order}", _paley_second(order // 2 - 1) / math.sqrt(order)
        if order == 4 * odd and odd in WILLIAMSON:
            return f"williamson-{order}", _williamson(odd) / math.sqrt(order)
        order *= 2
    return f"cosine-{odd}", _cosine(odd)


def _sylvester(order: int) -> Tensor:
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < order:
        matrix = torch.kron(matrix, pair)
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _jacobsthal(prime: int) -> Tensor:
    residues = {i * i % prime for i in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if i in residues else -1.0 for i in range(1, prime)], dtype=torch.float64)
    index = torch.arange(prime)
    return character[(index[:, None] - index[None, :]) % prime]


def _paley_first(prime: int) -> Tensor:
    core = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    core[0, 1:], core[1:, 0], core[1:, 1:] = 1.0, -1.0, _jacobsthal(prime)
    return torch.eye(prime + 1, dtype=torch.float64) + core


def _paley_second(prime: int) -> Tensor:
    core = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    core[0, 1:], core[1:, 0], core[1:, 1:] = 1.0, 1.0, _jacobsthal(prime)
    off = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(core, off) + torch.kron(torch.eye(prime + 1, dtype=torch.float64), diagonal)


def _williamson(odd: int) -> Tensor:
    index = torch.arange(odd)
    apart = (index[:, None] - index[None, :]) % odd
    nearer = torch.minimum(apart, odd - apart)
    signs = [torch.tensor([1.0 if s == "+" else -1.0 for s in row], dtype=torch.float64) for row in WILLIAMSON[odd]]
    a, b, c, d = (row[nearer] for row in signs)
    blocks = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    return torch.cat([torch.cat(row, 1) for row in blocks])


def _cosine(order: int) -> Tensor:
    row = torch.arange(order, dtype=torch.float64)
    matrix = torch.cos(math.pi / order * (row[None, :] + 0.5) * row[:, None]) * math.sqrt(2 / order)
    matrix[0] /= math.sqrt(2)
    return matrix
