"""The prefix: which tokens the search finds, and that it matters exactly where activations are massive.

Massive activations are planted: a token's embedding points along one channel, which one hidden channel of an MLP reads
with large weights, so that the input of down_proj is thousands of times larger there than at any other token.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import mergequant
from families import make_model
from mergequant.calibration import StorePolicy
from mergequant.checkpoint import open_checkpoint
from mergequant.errors import RecipeError
from mergequant.models import ModelShell
from mergequant.pipeline import Quantized
from mergequant.pipeline.prefix import OutlierTokens, choose_prefix, find_outlier_tokens
from mergequant.recipes import get_recipe

BOS, LOUD, LOUDER, QUIET = 1, 7, 9, 11
CHANNEL, HIDDEN = 5, 17
CPU = StorePolicy(torch.device("cpu"))


def planted(*tokens: int) -> PreTrainedModel:
    """A small llama in which these tokens, wherever they stand, have massive activations in block 0."""
    model = make_model("llama")
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[:, CHANNEL] = 0
        embedding[list(tokens)] *= 0.1
        embedding[list(tokens), CHANNEL] = 10.0
        block = model.get_submodule("model.layers.0")
        block.get_submodule("self_attn.v_proj").weight[:, CHANNEL] = 0  # attention neither reads nor writes the channel
        block.get_submodule("self_attn.o_proj").weight[CHANNEL] = 0
        for name in ("mlp.gate_proj", "mlp.up_proj"):
            block.get_submodule(name).weight[:, CHANNEL] *= 0.01
            block.get_submodule(name).weight[HIDDEN, CHANNEL] = 60.0
        block.get_submodule("mlp.down_proj").weight[:, HIDDEN] *= 1e-4
    return model


def windows_of(*rows: list[int]) -> Tensor:
    """Windows that begin with BOS; rows hold the ids to put at fixed places, others are ordinary."""
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(20, 97, (len(rows), 24), generator=generator)
    tokens[:, 0] = BOS
    for row, ids in zip(tokens, rows):
        for number, token in enumerate(ids):
            row[5 + 3 * number] = token
    return tokens


def found(model: PreTrainedModel, tokens: Tensor) -> OutlierTokens:
    shell = ModelShell.open(model)
    return find_outlier_tokens(shell, shell.structures, tokens, CPU)


def test_find_outlier_tokens_when_tokens_are_planted_expect_the_most_frequent_first() -> None:
    tokens = windows_of([LOUD, LOUDER], [LOUDER], [LOUDER, LOUD], [LOUDER])
    assert found(planted(BOS, LOUD, LOUDER), tokens) == OutlierTokens(BOS, (LOUDER, LOUD))  # 6 in 4 windows: 2


def test_find_outlier_tokens_when_few_windows_hold_one_expect_as_many_as_a_window_holds() -> None:
    tokens = windows_of([LOUD], [LOUDER], [LOUDER], [])
    assert found(planted(LOUD, LOUDER), tokens) == OutlierTokens(None, (LOUDER,))


def test_find_outlier_tokens_when_nothing_is_massive_expect_none() -> None:
    assert found(make_model("llama"), windows_of([LOUD], [LOUDER])) == OutlierTokens(None, ())


def test_find_outlier_tokens_when_a_token_has_hardly_any_key_expect_it() -> None:
    model = make_model("llama")
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding[:, CHANNEL] = 0
        embedding[QUIET] = 0
        embedding[QUIET, CHANNEL] = 1.0
        model.get_submodule("model.layers.0.self_attn.k_proj").weight[:, CHANNEL] = 0
    assert found(model, windows_of([QUIET], [QUIET])) == OutlierTokens(None, (QUIET,))


def choose(model: PreTrainedModel, tokens: Tensor, bos: int | None) -> tuple[list[int], bool] | None:
    shell = ModelShell.open(model)
    return choose_prefix("auto", shell, shell.structures, tokens, bos, CPU)


def test_choose_prefix_when_auto_expect_bos_and_then_what_was_found() -> None:
    tokens = windows_of([LOUD], [LOUD], [LOUD], [LOUD])
    assert choose(planted(BOS, LOUD), tokens, BOS) == ([BOS, LOUD], True)
    assert choose(make_model("llama"), tokens, BOS) == ([BOS], True)


def test_choose_prefix_when_there_is_no_bos_expect_the_id_that_is_massive_at_position_0() -> None:
    tokens = windows_of([], [])
    tokens[:, 0] = LOUD
    assert choose(planted(LOUD), tokens, None) == ([LOUD], False)
    with pytest.raises(RecipeError, match="no outlier token"):
        choose(make_model("llama"), tokens, None)


def error(quantized: Quantized, model: PreTrainedModel, tokens: Tensor) -> float:
    """Relative error of the logits behind BOS."""
    with torch.no_grad():
        exact = model(tokens).logits[:, 1:]
        given = mergequant.load(quantized.folder)(tokens).logits[:, 1:]
    return float((given - exact).norm() / exact.norm())


@pytest.mark.parametrize("recipe", ["prefixquant", "mergequant-plus"])
def test_prefix_when_bos_is_massive_expect_static_steps_to_need_it_and_else_hardly(
    recipe: str, run: Callable[..., Quantized], windows: Callable[..., Tensor]
) -> None:
    settings = {"activation_bits": 8, "weight_bits": 8}
    settings |= {"other_bits": 8, "tile": 8, "allow_no_prefix": True} if recipe == "mergequant-plus" else {}
    ratios = []
    for model in (planted(BOS), make_model("llama")):
        tokens = windows(model, 3, 21, seed=2)
        tokens[:, 1:].clamp_(min=20)
        with_prefix, without = (
            error(run(model, recipe, settings={**settings, "prefix_tokens": choice}), model, tokens)
            for choice in ("auto", "none")
        )
        ratios.append(without / with_prefix)
    assert ratios[0] > 4
    assert ratios[1] < 1.5


def test_prefix_tokens_when_explicit_expect_them_stored_for_mergequant(
    tmp_path: Path, run: Callable[..., Quantized]
) -> None:
    run(make_model("llama"), "mergequant", tmp_path / "out", settings={"prefix_tokens": [BOS, LOUD]})
    prefix = open_checkpoint(tmp_path / "out").quantization.prefix
    assert prefix is not None
    assert (prefix.tokens, prefix.replaces_bos) == ((BOS, LOUD), True)


def test_prefix_tokens_expect_another_name_of_prefix() -> None:
    for name in ("mergequant", "mergequant-plus", "quarot", "prefixquant", "qserve"):
        assert get_recipe(name, prefix_tokens="auto") == get_recipe(name, prefix="auto")
        assert get_recipe(name).with_settings({"prefix_tokens": [3, 4]}).prefix == (3, 4)
    with pytest.raises(RecipeError, match="no parameter"):
        get_recipe("rtn", prefix_tokens="auto")
