"""Changes of a whole model: what is proven, what is refused, and that a shell is left as it was."""

import pytest
import torch
from torch import Tensor, nn

from families import make_model
from mergequant.errors import StructureError
from mergequant.models import BlockStructure, ModelShell, ModelTransform, OutsideParts
from mergequant.models.transform import prove_transform


class Permute(ModelTransform):
    """Channels of the residual stream in reverse order; `forgets` names what is left alone."""

    def __init__(self, forgets: str = "") -> None:
        self.forgets = forgets

    def hidden(self, hidden: Tensor) -> Tensor:
        return hidden.flip(-1)

    def outside(self, parts: OutsideParts) -> None:
        for name, module in (("embedding", parts.embedding), ("norm", parts.norm), ("head", parts.head)):
            if name != self.forgets:
                weight = module.get_parameter("weight")
                weight.copy_(weight.flip(-1))

    def block(self, index: int, block: nn.Module, structure: BlockStructure) -> None:
        for site in structure.sites:
            names = [*site.consumers, *([site.norm.name] if site.norm else [])]
            for name in names:
                if name != self.forgets:
                    weight = block.get_submodule(name).get_parameter("weight")
                    weight.copy_(weight.flip(-1 if site.norm else 0))


def test_prove_transform_when_it_keeps_the_function_expect_rounding_noise_and_the_shell_unchanged() -> None:
    shell = ModelShell.open(make_model("llama"))
    before = {name: tensor.clone() for name, tensor in shell.model.state_dict().items() if tensor.device.type != "meta"}
    assert prove_transform(shell, Permute()) < 1e-12
    after = shell.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not shell.transforms


@pytest.mark.parametrize(
    ("forgets", "what"),
    [
        ("embedding", "the embedding"),
        ("norm", "the final norm"),
        ("head", "the head"),
        ("mlp.down_proj", r"model\.layers\.0"),
        ("input_layernorm", r"model\.layers\.0"),
    ],
)
def test_apply_when_a_part_is_forgotten_expect_error_that_names_where(forgets: str, what: str) -> None:
    shell = ModelShell.open(make_model("llama"))
    with pytest.raises(StructureError, match=f"{what}.*(mergequant-plus)"):
        shell.apply(Permute(forgets))
    assert not shell.transforms


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen2"])
def test_apply_when_model_is_run_expect_the_same_logits(family: str) -> None:
    model = make_model(family)
    shell = ModelShell.open(model)
    shell.apply(Permute())
    for index in range(len(shell.blocks)):
        shell.load_block(index)
    tokens = torch.arange(3, 35).reshape(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(shell.model(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_apply_when_head_is_tied_expect_a_weight_of_its_own_counted_and_the_given_model_untouched() -> None:
    model = make_model("qwen2")
    shell = ModelShell.open(model)
    shell.apply(Permute())
    embedding, head = (shell.model.get_parameter(f"{name}.weight") for name in ("model.embed_tokens", "lm_head"))
    assert embedding is not head
    assert shell.untied_parameters == embedding.numel()
    assert not shell.config.tie_word_embeddings
    assert model.config.tie_word_embeddings
    assert torch.equal(model.get_parameter("model.embed_tokens.weight"), embedding.flip(-1))


def test_apply_when_weights_are_half_expect_embedding_and_head_in_their_dtype() -> None:
    shell = ModelShell.open(make_model("llama", dtype=torch.bfloat16))
    shell.apply(Permute())
    for name in ("model.embed_tokens", "lm_head"):
        weight = shell.model.get_parameter(f"{name}.weight")
        assert torch.equal(weight, weight.bfloat16().float())


def test_load_block_when_not_transformed_expect_the_stored_weights() -> None:
    model = make_model("llama")
    shell = ModelShell.open(model)
    shell.apply(Permute())
    stored = model.get_submodule("model.layers.1.mlp.gate_proj").get_parameter("weight")
    found = shell.load_block(1, transformed=False).get_submodule("mlp.gate_proj").get_parameter("weight")
    assert torch.equal(found, stored)
    found = shell.load_block(1).get_submodule("mlp.gate_proj").get_parameter("weight")
    assert torch.equal(found, stored.flip(-1))


def test_outside_parts_when_embedding_is_projected_expect_refusal() -> None:
    shell = ModelShell.open(make_model("opt_gelu_projected"))
    with pytest.raises(StructureError, match="mergequant-plus"):
        shell.outside_parts()
