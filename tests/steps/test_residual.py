"""Rotation of the residual stream: exact in float64 on every family that it serves, and refused on the others."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

import mergequant
from default_recipes import REFUSED
from families import COMMON, FAMILIES, make_model
from mergequant import ops
from mergequant.calibration import BlockContext
from mergequant.errors import StructureError
from mergequant.models import ModelShell
from mergequant.models.probe import all_double
from mergequant.steps import MixHeads, RotateResidual
from mergequant.steps.residual import ResidualRotation, _head_width

SERVED = [family for family in FAMILIES if family not in REFUSED["quarot"]]


EMBEDDING = "model.embed_tokens.weight"


def rotated(
    model: PreTrainedModel, step: RotateResidual, seed: int = 0, dtype: torch.dtype = torch.float32
) -> ModelShell:
    shell = ModelShell.open(model, dtype=dtype)
    assert shell.apply(step.transform(shell, seed)) <= 1e-10
    for index in range(len(shell.blocks)):
        shell.load_block(index)
    return shell


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("family", SERVED)
def test_rotated_model_on_family_expect_equal_logits_in_float64(family: str, heads: bool) -> None:
    model = make_model(family, dtype=torch.float64)
    shell = rotated(model, RotateResidual(heads=heads), seed=3, dtype=torch.float64)
    tokens = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), all_double():
        expected, found = model(tokens).logits, shell.model(tokens).logits
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-10


def test_rotated_model_expect_other_weights_for_other_seeds_and_spread_outliers() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 3] *= 50
    first, again, other = (rotated(model, RotateResidual(), seed).model.get_parameter(EMBEDDING) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)

    def ratio(weight: torch.Tensor) -> float:
        size = weight.detach().norm(dim=0)
        return float(size.max() / size.median())

    assert ratio(model.get_parameter(EMBEDDING)) > 10
    assert ratio(first) < 3


def test_rotated_block_expect_values_of_each_head_rotated_and_gains_of_one() -> None:
    model = make_model("llama")
    plain, shell = rotated(model, RotateResidual(heads=False)), rotated(model, RotateResidual())
    name = "model.layers.0.self_attn.v_proj.weight"
    before, after = (each.model.get_parameter(name) for each in (plain, shell))
    rotation = ResidualRotation(torch.ones(40, dtype=torch.float64), 10)
    torch.testing.assert_close(after, rotation.by_head(before.double().t(), 0).t().float())
    assert not torch.allclose(before, after, atol=1e-2)
    gain = shell.model.get_parameter("model.layers.0.input_layernorm.weight")
    assert torch.equal(gain, torch.ones_like(gain))


@pytest.mark.parametrize("family", ["llama", "llama_no_gqa", "qwen3"])
def test_mixed_heads_behind_rotated_values_expect_the_whole_input_rotated(
    open_block: Callable[..., BlockContext], family: str
) -> None:
    context = open_block(family)
    (site,) = (site for site in context.structure.sites if site.kind == "attention_output")
    own = context.site(site)
    plain = own.sample("calibration", 64).double()
    weight = own.stacked_weight().double()
    MixHeads().run(own)
    heads = site.width // _head_width(context.chain.shell)
    mixing = torch.kron(ops.rotation(heads).matrix(), torch.eye(site.width // heads, dtype=torch.float64))
    found = own.sample("calibration", 64).double()
    torch.testing.assert_close(found, plain @ mixing, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found @ own.stacked_weight().double().t(), plain @ weight.t(), rtol=1e-4, atol=1e-5)
    assert own.transform is not None
    assert own.transform.right is None


def test_mixed_heads_when_heads_are_not_whole_expect_refusal(open_block: Callable[..., BlockContext]) -> None:
    context = open_block()
    (site,) = (site for site in context.structure.sites if site.kind == "attention_output")
    context.chain.shell.config.head_dim = 4
    with pytest.raises(StructureError, match=r"whole value heads.*heads=online"):
        MixHeads().run(context.site(site))


@pytest.mark.parametrize(
    ("family", "words"),
    [("opt", "LayerNorm, which subtracts a mean"), ("gemma2", "behind a projection"), ("opt_gelu_projected", "width")],
)
def test_transform_when_family_cannot_be_rotated_expect_the_reason_and_a_recipe_that_works(
    family: str, words: str
) -> None:
    shell = ModelShell.open(make_model(family))
    with pytest.raises(StructureError, match=f"{words}(.|\n)*mergequant-plus"):
        RotateResidual().transform(shell, 0)


def test_transform_when_heads_are_odd_expect_refusal_and_the_setting_that_works() -> None:
    model = make_model("llama")
    shell = ModelShell.open(model)
    shell.config.head_dim = 5
    with pytest.raises(StructureError, match=r"odd size.*heads=none"):
        RotateResidual().transform(shell, 0)
    RotateResidual(heads=False).transform(shell, 0)


def test_transform_when_heads_are_not_whole_expect_refusal() -> None:
    shell = ModelShell.open(make_model("llama"))
    shell.config.head_dim = 4
    with pytest.raises(StructureError, match="whole value heads"):
        RotateResidual().transform(shell, 0)


def test_transform_when_a_linear_belongs_to_no_site_expect_refusal_that_names_it() -> None:
    shell = ModelShell.open(make_model("llama"))
    structure = replace(shell.structures[0], unserved=("mlp.router",))
    shell.__dict__["structures"] = [structure, structure]
    with pytest.raises(StructureError, match=r"mlp\.router.*a router or experts.*gptq"):
        RotateResidual().transform(shell, 0)


def test_transform_when_model_has_experts_expect_refusal_and_a_recipe_that_works() -> None:
    torch.manual_seed(0)
    config = MixtralConfig(**{**COMMON, "num_local_experts": 2, "num_experts_per_tok": 1})
    model = MixtralForCausalLM(config).eval()
    with pytest.raises(StructureError, match=r"mlp\.experts.*a router or experts.*gptq"):
        RotateResidual().transform(ModelShell.open(model), 0)
    assert {site.kind for site in mergequant.plan(model, "gptq").sites} == {"norm", "attention_output"}


def test_apply_when_head_width_is_wrong_expect_the_proof_to_fail() -> None:
    shell = ModelShell.open(LlamaForCausalLM(LlamaConfig(**{**COMMON, "num_key_value_heads": 4})).eval())
    signs = torch.ones(40, dtype=torch.float64)
    with pytest.raises(StructureError, match="changes its function"):
        shell.apply(ResidualRotation(signs, 20))
