"""A channel of a norm made louder, and its consumers' columns as much quieter: the same function, and the same codes.

What static steps per channel are for: outlier channels cost them nothing, and ruin a scale per token.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import mergequant
from families import FAMILIES, make_model
from mergequant.models import ModelShell
from mergequant.pipeline import Quantized

LOUDER = 64.0  # a power of two: floats keep all of their digits
CHANNELS = [3, 17, 30]
# Every choice but one looks at codes and folded weights only. The paper's split by step size looks at the step itself.
SETTINGS = {"strength": "column", "stagger": True}


def with_outliers(model: PreTrainedModel) -> tuple[PreTrainedModel, bool]:
    """The same function with loud channels in every norm that feeds linears; whether no float lost a digit by it."""
    changed, exact = copy.deepcopy(model), True
    shell = ModelShell.open(model)
    with torch.no_grad():
        for name, structure in zip(shell.block_names, shell.structures):
            block = changed.get_submodule(name)
            for site in structure.sites:
                if site.norm is None:
                    continue
                factor = torch.ones(site.width)
                factor[CHANNELS] = LOUDER
                norm = block.get_submodule(site.norm.name)
                site.norm.set_gain(norm, site.norm.gain(norm) * factor)
                exact = exact and not site.norm.unit_offset
                bias = site.norm.bias(norm)
                if bias is not None:
                    site.norm.set_bias(norm, bias * factor)
                for consumer in site.consumers:
                    block.get_submodule(consumer).weight.div_(factor)
    return changed, exact


def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits


def error(quantized: Quantized, model: PreTrainedModel, tokens: Tensor) -> float:
    """Relative error of the logits."""
    exact = logits(model, tokens)
    return float((logits(mergequant.load(quantized.folder), tokens) - exact).norm() / exact.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_outlier_channels_change_no_code_of_mergequant_and_ruin_token_scales(
    family: str, run: Callable[..., Quantized], windows: Callable[..., Tensor]
) -> None:
    plain = make_model(family)
    loud, exact = with_outliers(plain)
    tokens = windows(plain, 3, 21, seed=2)
    torch.testing.assert_close(logits(loud, tokens), logits(plain, tokens), rtol=1e-4, atol=1e-4)

    pair = [run(model, "mergequant", settings=SETTINGS) for model in (plain, loud)]
    given = [logits(mergequant.load(result.folder), tokens) for result in pair]
    if exact:
        assert torch.equal(given[0], given[1])
    else:  # a gain of 1 + weight: the weight cannot hold all digits of the product
        assert float((given[0] - given[1]).norm() / given[0].norm()) < 1e-3

    ruined = [error(run(model, "rtn"), model, tokens) for model in (plain, loud)]
    assert ruined[1] > 1.2 * ruined[0]
    assert ruined[1] > 1.5 * error(pair[1], loud, tokens)
