"""Gradients block by block: those of the whole model, windows joined by squares, weights and memory as before."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from families import make_model
from mergequant.calibration import StorePolicy
from mergequant.calibration.gradients import block_gradients
from mergequant.models import ModelShell


def windows(count: int) -> Tensor:
    tokens = torch.randint(3, 97, (count, 20), generator=torch.Generator().manual_seed(5))
    tokens[:, 0] = 1
    return tokens


def whole(family: str, tokens: Tensor) -> dict[str, Tensor]:
    """The same by autograd on the whole model: one backward pass for each window."""
    model = make_model(family).requires_grad_(True)
    sums: dict[str, Tensor] = {}
    for window in tokens:
        model.zero_grad()
        logits = model(window[None]).logits[0, :-1]
        nn.functional.cross_entropy(logits, window[1:]).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                sums[name] = sums.get(name, torch.zeros(())) + parameter.grad.square()
    return {name: total.sqrt() for name, total in sums.items()}


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize("family", ["llama_tied_wide_heads", "gemma2", "opt_gelu_projected"])
def test_block_gradients_expect_those_of_autograd_on_the_whole_model(family: str, spill: bool, tmp_path: Path) -> None:
    tokens = windows(3)
    expected = whole(family, tokens)
    model = make_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shell = ModelShell.open(model)
    policy = StorePolicy(torch.device("cpu"), memory_bytes=0 if spill else 1 << 30, folder=tmp_path)
    linears = [[name for site in structure.sites for name in site.consumers] for structure in shell.structures]
    blocks = []
    for index, found in block_gradients(shell, tokens, policy, linears):
        blocks.append(index)
        assert set(found) == set(linears[index])
        for name, value in found.items():
            torch.testing.assert_close(
                value, expected[f"{shell.block_names[index]}.{name}.weight"], rtol=1e-4, atol=1e-8
            )
    assert blocks == [1, 0]
    assert all(parameter.is_meta for block in shell.blocks for parameter in block.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not list(tmp_path.iterdir())


def test_block_gradients_when_signed_expect_the_magnitude_of_the_sum() -> None:
    shell = ModelShell.open(make_model("llama"))
    linears = [[name for site in structure.sites for name in site.consumers] for structure in shell.structures]
    policy = StorePolicy(torch.device("cpu"))

    def last(tokens: Tensor, signed: bool) -> Tensor:
        return next(iter(block_gradients(shell, tokens, policy, linears, signed=signed)))[1][linears[1][0]]

    one, two = windows(2)[:1], windows(2)
    assert torch.equal(last(one, True), last(one, False))
    assert bool((last(two, True) <= 2**0.5 * last(two, False) * 1.001 + 1e-9).all())
    twice = torch.cat([one, one])
    torch.testing.assert_close(last(twice, True), 2 * last(one, False))
    torch.testing.assert_close(last(twice, False), 2**0.5 * last(one, False))
