"""A synthetic layer for VPTQ and CMPQ: heavy-tailed weights, inputs with a falling spectrum and strong channels."""

from functools import cache

import torch
from torch import Tensor

from mergequant.solvers import output_error

SIZE, TOKENS, STRONG = 256, 2048, 20.0


@cache
def layer_weight() -> Tensor:
    """Student-t weights with 5 degrees of freedom (SIZE, SIZE)."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(SIZE, SIZE, generator=generator)
    chi = torch.randn(SIZE, SIZE, 5, generator=generator).square().sum(-1)
    return normal * (5 / chi).sqrt()


@cache
def layer_hessian(kind: str) -> Tensor:
    """Raw sum of x x^T, float64: "spiked" = falling spectrum, four channels x 20; "uneven" = log-normal; "flat"."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, SIZE, generator=generator).double()
    if kind == "spiked":
        basis = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator).double())[0]
        x = x / torch.arange(1, SIZE + 1).sqrt() @ basis.t()
        x[:, :: SIZE // 4] *= STRONG
    elif kind == "uneven":
        x = x * torch.exp(0.8 * torch.randn(SIZE, generator=generator)).double()
    return x.t() @ x


def relative_error(made: Tensor, kind: str) -> float:
    """tr(E H E^T) / tr(W H W^T)."""
    hessian = layer_hessian(kind)
    return output_error(made - layer_weight(), hessian) / output_error(layer_weight(), hessian)
