"""Block-wise reconstruction: it learns, repeats itself, leaves the rest alone, and says what is wrong."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from mergequant.calibration import BlockContext, StorePolicy
from mergequant.errors import NumericsError, RecipeError
from mergequant.grids import IntegerGrid
from mergequant.steps.reconstruct import Training, fake_quantize, reconstruct

RATES = {"*.weight": 1e-3}


def spoiled(context: BlockContext) -> nn.Module:
    """A copy of the block with a disturbed down_proj."""
    block = copy.deepcopy(context.module)
    weight = block.mlp.down_proj.weight
    weight.data += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return block


@pytest.mark.parametrize("batch_tokens", [0, 64])
@pytest.mark.parametrize("prefix", [None, ([1], True)])
def test_reconstruct_expect_a_falling_loss_and_the_same_again(
    prefix: tuple[list[int], bool] | None, batch_tokens: int, open_block: Callable[..., BlockContext]
) -> None:
    trained = []
    for _ in range(2):
        context = open_block(prefix=prefix)
        block = spoiled(context)
        others = {name: p.clone() for name, p in block.named_parameters() if "down_proj" not in name}
        lines: list[str] = []
        context.progress = lines.append
        training = Training(4, 2, batch_tokens)
        history = reconstruct(context, block, {"mlp.down_proj.weight": 5e-3}, training)
        assert history == sorted(history, reverse=True)
        assert len(history) == len(lines) == 4
        assert history[-1] < 0.7 * history[0]
        assert all(torch.equal(block.get_parameter(name), value) for name, value in others.items())
        trained.append(block.mlp.down_proj.weight.detach())
    assert torch.equal(*trained)


def test_reconstruct_when_activations_spill_to_disk_expect_the_same(open_block: Callable[..., BlockContext]) -> None:
    histories = []
    for policy in (StorePolicy(torch.device("cpu")), StorePolicy(torch.device("cpu"), 0, 0)):
        context = open_block()
        context.chain.policy = policy
        histories.append(reconstruct(context, spoiled(context), RATES, Training(2, 2)))
    assert histories[0] == histories[1]


def test_reconstruct_when_rates_match_nothing_or_training_diverges_expect_errors(
    open_block: Callable[..., BlockContext],
) -> None:
    context = open_block()
    with pytest.raises(RecipeError, match="no parameter of the block is called 'nothing'"):
        reconstruct(context, spoiled(context), {"nothing": 1.0}, Training(1, 1))
    with pytest.raises(NumericsError, match="lower the rate"):
        reconstruct(context, spoiled(context), {"*.weight": 1e30}, Training(9, 2), "lower the rate")


def test_fake_quantize_expect_rounded_values_and_gradients_of_scale_and_values() -> None:
    values = torch.tensor([[0.3, 1.2, -9.0, 20.0]], requires_grad=True)
    scale = torch.tensor([[0.5]], requires_grad=True)
    rounded = fake_quantize(values, scale, 4)
    assert torch.equal(rounded, IntegerGrid(4).nearest(values.detach() / 0.5) * 0.5)
    rounded.sum().backward()
    assert torch.equal(values.grad, torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    expected = (1 - 0.6) + (2 - 2.4) - 8 + 7
    torch.testing.assert_close(scale.grad, torch.tensor([[expected]]))
