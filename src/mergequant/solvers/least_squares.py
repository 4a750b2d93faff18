"""Closed-form compensation: the weight that best undoes what quantizing its input has done.

MergeQuant digest, open choice F: V = argmin ||Q V^T - X W^T||^2 + ridge ||V - W'||^2, solved before the final rounding,
so that nothing is added at run time.
"""

import torch
from torch import Tensor

__all__ = ["least_squares_weight"]


def least_squares_weight(folded: Tensor, weight: Tensor, gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """Ridge least squares around the folded weight.

    Args:
        folded: W' (outputs, width), the weight that goes with the coded input when nothing is corrected.
        weight: W (outputs, channels), the weight that goes with the float input.
        gram: raw sum of q q^T (width, width), q the coded input.
        cross: raw sum of q x^T (width, channels), x the float input.
        ridge: weight of the pull towards W', as a share of the mean diagonal of `gram`.

    Returns:
        V (outputs, width), float32.
    """
    pull = ridge * torch.diagonal(gram).mean().clamp_min(1e-12)
    left = gram.double() + pull * torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
    right = cross.double() @ weight.double().t() + pull * folded.double().t()
    return torch.linalg.solve(left, right).t().float().contiguous()
