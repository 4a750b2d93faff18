"""The joint loss: what a choice of scales costs at the output, weights and activations quantized together."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergequant.calibration import SiteContext
from mergequant.grids import ClipSearch, IntegerGrid, Quantizer
from mergequant.solvers import GramSum, gptq, invert_hessian, rtn
from mergequant.transforms import InputScheme

__all__ = ["Judge", "RoundingName"]

RoundingName = Literal["gptq", "rtn", "quantease"]


@dataclass(frozen=True)
class Judge:
    """Scores input schemes of a site on tokens that were not used to fit them.

    Weights are rounded on calibration tokens, the error is measured on held-out ones (digest choice D: the loss must
    see the weights; judging with GPTQ weights is what the final checkpoint will have).

    Attributes:
        rounding: "rtn"; "gptq" and "quantease" are judged with GPTQ.
        weight_bits: bits of the weight codes.
        fit_tokens, test_tokens: tokens to fit and to measure on.
    """

    rounding: RoundingName = "gptq"
    weight_bits: int = 4
    fit_tokens: int = 8192
    test_tokens: int = 4096

    def relative_error(self, context: SiteContext, scheme: InputScheme) -> float:
        """||values(X) Q^T - X W^T||^2 / ||X W^T||^2 over all consumers, on held-out tokens."""
        weight = context.stacked_weight()
        test = context.sample("held_out", self.test_tokens)
        rounded = self._round(context, scheme, scheme.fold(weight))
        target = test @ weight.t()
        error = scheme.values(test) @ rounded.t() - target
        return float(error.square().sum() / target.square().sum().clamp_min(1e-30))

    def _round(self, context: SiteContext, scheme: InputScheme, folded: Tensor) -> Tensor:
        quantizer = Quantizer(IntegerGrid(self.weight_bits), None, ClipSearch(norm=2.5, steps=17))
        if self.rounding == "rtn":
            return rtn(folded, quantizer).quantized.decode()
        fit = scheme.values(context.sample("calibration", self.fit_tokens))
        gram = GramSum.zeros(fit.shape[1], fit.shape[1], fit.device)
        gram.add(fit)
        if not bool(torch.diagonal(gram.total).any()):
            return rtn(folded, quantizer).quantized.decode()
        return gptq(folded, invert_hessian(gram.total), quantizer).quantized.decode()
