"""BiasedNorm: a norm of the float model, while it is being quantized, with a bias that it did not have."""

import torch
from torch import Tensor, nn

from mergequant.models.roles import NormRole

__all__ = ["BiasedNorm"]


class BiasedNorm(nn.Module):
    """The proven function of a norm, plus a bias; what a channel shift needs where the architecture has no bias.

    Its parameters are called as the role expects them: `weight` (as the norm stored it) and `bias`, at first zero.

    Args:
        role: what the norm computes.
        norm: the norm; its weight is taken over.
    """

    def __init__(self, role: NormRole, norm: nn.Module) -> None:
        super().__init__()
        self.role = role
        weight = norm.get_parameter("weight").detach()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros_like(weight), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., channels) to the same; at least in float32, rounded once at the end."""
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        if self.role.kind == "layer":
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.role.eps)
        return (wide * (self.weight + float(self.role.unit_offset)) + self.bias).to(hidden.dtype)
