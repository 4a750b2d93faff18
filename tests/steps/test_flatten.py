"""Learned transforms: what they do to a block, and that they learn."""

from collections.abc import Callable

import pytest
import torch

from families import FAMILIES
from mergequant.calibration import BlockContext
from mergequant.errors import RecipeError
from mergequant.steps import Flatten, Round
from mergequant.steps.flatten import _cayley, _Factor
from mergequant.transforms import FloatScheme, TokenScheme


def output(context: BlockContext) -> torch.Tensor:
    with torch.no_grad():
        return context.chain.run(context.chain.hidden[0])


@pytest.mark.parametrize("prefix", [None, ([1], True)])
@pytest.mark.parametrize("family", FAMILIES)
def test_flatten_on_family_expect_the_blocks_function_kept_before_rounding(
    family: str, prefix: tuple[list[int], bool] | None, open_block: Callable[..., BlockContext]
) -> None:
    """What norms, up_proj, v_proj and the prefix took up is undone by the consumers."""
    context = open_block(family, prefix)
    before = output(context)
    Flatten(epochs=1, start="random", rate=0.1, clip=False).run(context)
    after = output(context)
    assert float((after - before).norm() / before.norm()) < 1e-5
    assert not torch.equal(after, before)
    for own in context.sites.values():
        inputs = own.sample("calibration", 50)
        captured = torch.cat(list(context.capture(own.site)))
        for name in own.site.consumers:
            held = own.weights[name]
            weight = context.linear(name).weight
            index = min(7, captured.shape[0] - 1)
            flat = own.transform.apply(captured[index])
            torch.testing.assert_close(held @ flat, weight @ captured[index], rtol=1e-3, atol=1e-3)
        assert inputs.shape[1] == own.site.width


def test_flatten_expect_head_mixing_in_v_proj_and_only_the_heads_left_online(
    open_block: Callable[..., BlockContext],
) -> None:
    context = open_block()
    values = context.linear("self_attn.v_proj").weight.clone()
    Flatten(epochs=0).run(context)
    sites = {site.kind: context.sites[site.name] for site in context.structure.sites}
    transform = sites["attention_output"].transform
    assert transform.left.shape == (4, 4)
    assert transform.right is None
    assert sites["mlp_output"].transform.left.shape == (4, 4)
    assert sites["mlp_output"].transform.right.shape == (13, 13)
    assert not torch.allclose(context.linear("self_attn.v_proj").weight.norm(dim=0), values.norm(dim=0) * 2)
    assert isinstance(sites["norm"].scheme, TokenScheme)


@pytest.mark.parametrize("start", ["hadamard", "random", "identity"])
def test_flatten_expect_training_to_lower_the_blocks_error(start: str, open_block: Callable[..., BlockContext]) -> None:
    context = open_block()
    Flatten(epochs=12, start=start).run(context)  # type: ignore[arg-type]
    figures = context.figures["block"]
    assert figures["loss_last_epoch"] < 0.95 * figures["loss_first_epoch"]
    conditions = [own["condition"] for name, own in context.figures.items() if name != "block"]
    assert all(1 < condition < 50 for condition in conditions)


def test_flatten_when_the_seed_is_the_same_expect_the_same_weights(open_block: Callable[..., BlockContext]) -> None:
    targets = []
    for _ in range(2):
        context = open_block()
        Flatten(epochs=2, start="random").run(context)
        targets.append({name: value for own in context.sites.values() for name, value in (own.targets or {}).items()})
    assert all(torch.equal(value, targets[1][name]) for name, value in targets[0].items())


def test_flatten_when_a_site_has_been_opened_expect_error(open_block: Callable[..., BlockContext]) -> None:
    context = open_block()
    own = context.site(context.structure.sites[0])
    with pytest.raises(RecipeError, match="before all steps of a site"):
        Flatten().run(context)
    context.sites.clear()
    Flatten(epochs=0).run(context)
    own = context.site(context.structure.sites[0])
    for act in (own.rotate, lambda: own.scale_channels(torch.ones(own.site.width)), lambda: own.flatten(own.transform)):
        with pytest.raises(RecipeError, match=r"transformed|already|before"):
            act()
    own.scheme = FloatScheme()
    with pytest.raises(RecipeError, match="needs dynamic inputs"):
        Round(method="rtn").run(own)


@pytest.mark.parametrize("wrong", [{"epochs": -1}, {"chunks": 0}, {"rate": 0.0}, {"alpha": 1.5}])
def test_flatten_when_a_parameter_is_out_of_range_expect_error(wrong: dict[str, float]) -> None:
    with pytest.raises(RecipeError, match="flatten"):
        Flatten(**wrong)  # type: ignore[arg-type]


def test_factor_expect_orthogonal_turns_and_an_exact_inverse() -> None:
    generator = torch.Generator().manual_seed(0)
    turned = _cayley(torch.randn(6, 6, dtype=torch.float64, generator=generator))
    torch.testing.assert_close(turned @ turned.t(), torch.eye(6, dtype=torch.float64))
    for start in ("hadamard", "random", "identity"):
        factor = _Factor(6, start, generator).double()
        with torch.no_grad():
            for parameter in factor.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator))
        matrix, inverse = factor.matrices()
        torch.testing.assert_close(matrix.t() @ inverse, torch.eye(6, dtype=torch.float64), rtol=1e-5, atol=1e-5)
