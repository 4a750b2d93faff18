"""Sparse weights of every kind, for tests of the op, the layer and the checkpoint."""

import torch
from torch import Tensor

from mergequant.grids import Outliers, SecondLevel, SparseTensor
from mergequant.nn import InputSpec, SparseLinear
from mergequant.solvers import SparseGroups, invert_hessian, spqr

OUTPUTS, WIDTH = 20, 128
WEIGHTS = ("bilevel", "bilevel ordered", "plain", "plain whole zeros", "no outliers", "symmetric", "rows")


def drawn(outputs: int = OUTPUTS, width: int = WIDTH, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A heavy-tailed weight (outputs, width) and the Hessian of correlated inputs with a few strong channels."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(5, outputs, width, generator=generator).square().mean(0).sqrt()
    weight = torch.randn(outputs, width, generator=generator) / spread / width**0.5
    turn = torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
    tokens = torch.randn(16 * width, width, generator=generator) / torch.arange(1, width + 1).sqrt() @ turn
    tokens[:, [1, width // 3, width // 2, width - 2]] *= 20
    return weight, tokens.double().t() @ tokens.double()


def weight_of(case: str, bits: int = 3) -> SparseTensor:
    weight, hessian = drawn()
    inverse = invert_hessian(hessian, activation_order="ordered" in case)
    level = SecondLevel(16, 3) if case in ("bilevel", "bilevel ordered", "no outliers") else None
    size = None if case == "rows" else 16
    threshold = float("inf") if case == "no outliers" else 0.1
    groups = SparseGroups(bits, size, level, whole_zeros="whole" in case)
    made = spqr(weight, inverse, groups, threshold=threshold).quantized
    assert isinstance(made, SparseTensor)
    if case == "symmetric":
        dense = SparseTensor(made.codes, made.scale, made.grid)
        return SparseTensor(
            made.codes, made.scale, made.grid, outliers=Outliers.whole(weight - dense.decode(), torch.tensor([3, 40]))
        )
    return made


def layer_of(case: str, bits: int = 3) -> SparseLinear:
    layer = SparseLinear.of(weight_of(case, bits), InputSpec("float", WIDTH, WIDTH), bias=True)
    assert layer.bias is not None
    layer.bias.copy_(torch.randn(OUTPUTS, generator=torch.Generator().manual_seed(3)))
    return layer
