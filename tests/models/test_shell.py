import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BloomConfig,
    DynamicCache,
    PreTrainedModel,
    RobertaConfig,
    T5Config,
    ViTConfig,
)

from families import ENCODERS, FAMILIES, make_model, save_model
from mergequant.assets import TINY
from mergequant.errors import ModelError, StructureError, UsageError, WeightsError
from mergequant.models import ModelShell

TOKENS = torch.randint(97, (2, 11), generator=torch.Generator().manual_seed(7))


def through_blocks(shell: ModelShell, tokens: torch.Tensor) -> torch.Tensor:
    hidden, kwargs = shell.block_kwargs(tokens)
    for index in range(len(shell.blocks)):
        shell.load_block(index)
        hidden = shell.run_block(index, hidden, kwargs[index])
        shell.release_block(index)
    return hidden


def by_blocks(shell: ModelShell, tokens: torch.Tensor) -> torch.Tensor:
    return shell.logits(tokens, through_blocks(shell, tokens))


def whole(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens).logits


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_model("llama", tmp_path / "llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_by_blocks_equal_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    folder = save_model(family, tmp_path)
    shell = ModelShell.open(folder)
    assert torch.equal(by_blocks(shell, TOKENS), whole(folder, TOKENS))
    assert shell.unused == []
    assert shell.stored_dtype == torch.float32
    assert all(p.is_meta for p in shell.blocks.parameters())


@pytest.mark.parametrize("family", ENCODERS)
def test_outputs_of_an_encoder_by_blocks_equal_those_of_the_whole_model(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    for shell in (ModelShell.open(model), ModelShell.open(save_model(family, tmp_path))):
        found = shell.outputs(TOKENS, through_blocks(shell, TOKENS))
        with torch.no_grad():
            expected = model(TOKENS)
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in found.items())
        assert shell.config.architectures == [type(model).__name__]
        assert (shell.final_norm_name, shell.head_name, shell.unused) == (None, None, [])


def test_encoder_whose_config_names_no_class_is_opened_bare_and_whose_head_has_an_unknown_name_is_refused(
    tmp_path: Path,
) -> None:
    folder = save_model("bert_classifier", tmp_path)
    edit_config(folder, architectures=None)
    shell = ModelShell.open(folder)
    assert type(shell.model).__name__ == "BertModel"
    assert "classifier.weight" in shell.unused
    edit_config(folder, architectures=["BertForNothing"])
    with pytest.raises(UsageError, match=r"'BertForNothing', which transformers' bert does not have.*BertModel"):
        ModelShell.open(folder)


def test_norms_of_a_bert_saved_long_ago_are_found_by_their_old_names(tmp_path: Path) -> None:
    folder = save_model("bert", tmp_path)
    expected = ModelShell.open(folder).load_block(0).state_dict()

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(name)

    edit_weights(folder, rename)
    shell = ModelShell.open(folder)
    assert shell.unused == []
    assert all(torch.equal(value, expected[name]) for name, value in shell.load_block(0).state_dict().items())


def test_encoder_with_a_vocabulary_head_predicts_no_next_token() -> None:
    config = RobertaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40
    )
    model = AutoModelForMaskedLM.from_config(config).eval()
    shell = ModelShell.open(model)
    with torch.no_grad():
        assert torch.equal(by_blocks(shell, TOKENS), model(TOKENS).logits)
    assert shell.head_name == "lm_head.decoder"
    assert not shell.generates


@pytest.mark.parametrize("family", ["llama_tied_wide_heads", "gemma2", "opt"])
def test_logits_of_a_model_in_memory_equal_its_own_and_leave_it_alone(family: str) -> None:
    model = make_model(family)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(TOKENS).logits
    shell = ModelShell.open(model)
    assert torch.equal(by_blocks(shell, TOKENS), expected)
    shell.load_block(0)
    for parameter in [*shell.blocks[0].parameters(), shell.model.get_input_embeddings().weight]:
        parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert shell.folder is None


def test_bundled_model_by_blocks_equals_the_whole() -> None:
    shell = ModelShell.open(TINY)
    assert torch.equal(by_blocks(shell, TOKENS), whole(TINY, TOKENS))
    assert shell.block_names[:2] == ["model.layers.0", "model.layers.1"]
    assert (shell.final_norm_name, shell.head_name) == ("model.norm", "lm_head")
    assert shell.stored_dtype == torch.bfloat16
    assert shell.max_positions == 2048
    assert shell.model.lm_head.weight is shell.model.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["stories260K", "tinystories-656k"])
def test_reference_model_by_blocks_equals_the_whole(name: str, test_data: Path) -> None:
    folder = test_data / "models" / name
    assert torch.equal(by_blocks(ModelShell.open(folder), TOKENS), whole(folder, TOKENS))


def test_final_norm_and_head_for_opt_are_found_inside_the_decoder() -> None:
    shell = ModelShell.open(make_model("opt_gelu_projected"))
    assert (shell.final_norm_name, shell.head_name) == ("model.decoder.final_layer_norm", "lm_head")


def test_blocks_that_return_tuples_give_the_same_logits() -> None:
    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)).eval()
    with torch.no_grad():
        assert torch.equal(by_blocks(ModelShell.open(model), TOKENS), model(TOKENS).logits)


def test_shards_give_the_same_logits_as_one_file(tmp_path: Path, llama: Path) -> None:
    folder = save_model("llama", tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert torch.equal(by_blocks(ModelShell.open(folder), TOKENS), whole(llama, TOKENS))


def test_names_without_the_base_prefix_are_found(llama: Path) -> None:
    expected = whole(llama, TOKENS)

    def strip(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    edit_weights(llama, strip)
    assert torch.equal(by_blocks(ModelShell.open(llama), TOKENS), expected)


def test_unused_tensors_are_listed_but_old_rotary_tables_are_not(llama: Path) -> None:
    extra = {"extra.weight": torch.ones(1), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}
    edit_weights(llama, lambda tensors: tensors.update(extra))
    assert ModelShell.open(llama).unused == ["extra.weight"]


# ---- blocks ------------------------------------------------------------------------------------------------------


def test_load_block_twice_undoes_changes_and_release_empties_it(llama: Path) -> None:
    shell = ModelShell.open(llama)
    first = shell.load_block(0)
    values = {name: p.clone() for name, p in first.named_parameters()}
    first.mlp.down_proj = nn.Identity()
    again = shell.load_block(0)
    assert shell.blocks[0] is again
    assert all(torch.equal(p, values[name]) for name, p in again.named_parameters())
    shell.release_block(0)
    assert {name: tuple(p.shape) for name, p in shell.blocks[0].named_parameters()} == shell.block_parameters(0)
    assert all(p.is_meta for p in shell.blocks[0].parameters())


def test_open_in_bfloat16_puts_weights_in_it_and_keeps_the_rotary_table(llama: Path) -> None:
    shell = ModelShell.open(llama, dtype=torch.bfloat16)
    assert {p.dtype for p in shell.load_block(1).parameters()} == {torch.bfloat16}
    assert shell.model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert shell.block_kwargs(TOKENS)[0].dtype == torch.bfloat16


def test_block_kwargs_differ_for_local_and_global_layers() -> None:
    kwargs = ModelShell.open(make_model("gemma2")).block_kwargs(TOKENS)[1]
    local, everywhere = kwargs[0]["attention_mask"], kwargs[1]["attention_mask"]
    assert local is not None
    assert everywhere is None or not torch.equal(local, everywhere)  # None: the kernel's own causal mask


def test_block_kwargs_with_a_cache_continues_like_the_whole_sequence(llama: Path) -> None:
    shell = ModelShell.open(llama)
    for index in range(2):
        shell.load_block(index)
    cache = DynamicCache(config=shell.config)
    pieces = []
    for part in (TOKENS[:, :6], TOKENS[:, 6:]):
        held = cache.get_seq_length()
        hidden, kwargs = shell.block_kwargs(part, cache=cache)
        assert cache.get_seq_length() == held
        for index in range(2):
            hidden = shell.run_block(index, hidden, kwargs[index])
        pieces.append(shell.logits(part, hidden))
    torch.testing.assert_close(torch.cat(pieces, 1), by_blocks(shell, TOKENS))


def test_model_after_a_pass_that_fails_is_as_before(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shell = ModelShell.open(llama)
    blocks = list(shell.blocks)

    def fail(*args: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(shell.model.model.norm, "forward", fail)
        with pytest.raises(ZeroDivisionError):
            shell.block_kwargs(TOKENS)
    assert list(shell.blocks) == blocks
    assert all("forward" not in block.__dict__ for block in blocks)
    shell.block_kwargs(TOKENS)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS[0], r"\(batch, tokens\)"),
        (TOKENS.int(), "int64"),
        (TOKENS[:, :0], "not empty"),
        (TOKENS + 90, "outside the vocabulary of 97"),
        (TOKENS - 97, "outside the vocabulary"),
        (TOKENS.repeat(1, 6), "66 tokens are more than the model's 64 positions"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(tokens: torch.Tensor, message: str, llama: Path) -> None:
    with pytest.raises(UsageError, match=message):
        ModelShell.open(llama).block_kwargs(tokens)


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_tensor_that_is_missing_is_named(llama: Path) -> None:
    edit_weights(llama, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(WeightsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        ModelShell.open(llama)


def test_tensor_of_another_shape_is_named_with_both_shapes(llama: Path) -> None:
    edit_config(llama, intermediate_size=60)
    with pytest.raises(WeightsError, match=r"gate_proj\.weight has shape \(52, 40\).*\(60, 40\)"):
        ModelShell.open(llama)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weight_in_a_block_that_is_not_finite_is_named_when_the_block_is_loaded(llama: Path, bad: float) -> None:
    edit_weights(llama, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3, 5].fill_(bad))
    shell = ModelShell.open(llama)
    shell.load_block(0)
    with pytest.raises(WeightsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds .* at index \(3, 5\)"):
        shell.load_block(1)


def test_embedding_that_is_not_finite_is_refused_at_once(llama: Path) -> None:
    edit_weights(llama, lambda tensors: tensors["model.embed_tokens.weight"][2, 1].fill_(float("nan")))
    with pytest.raises(WeightsError, match=r"embed_tokens\.weight holds nan at index \(2, 1\)"):
        ModelShell.open(llama)


def test_weight_too_large_for_float16_is_refused(llama: Path) -> None:
    edit_weights(llama, lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    with pytest.raises(WeightsError, match=r"too large for torch\.float16"):
        ModelShell.open(llama, dtype=torch.float16)


def test_integer_weights_are_refused(llama: Path) -> None:
    edit_weights(llama, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int8)}))
    with pytest.raises(WeightsError, match=r"model\.norm\.weight is stored as torch\.int8"):
        ModelShell.open(llama)


def test_tied_weights_that_differ_are_refused(llama: Path) -> None:
    edit_config(llama, tie_word_embeddings=True)
    with pytest.raises(WeightsError, match="config ties"):
        ModelShell.open(llama)


def test_quantized_model_is_refused(llama: Path) -> None:
    edit_config(llama, quantization_config={"quant_method": "gptq"})
    with pytest.raises(UsageError, match=r"already quantized \(gptq\)"):
        ModelShell.open(llama)


@pytest.mark.parametrize(
    ("config", "message"),
    [(T5Config(), "encoder-decoder"), (ViTConfig(), "neither a decoder language model nor a text encoder")],
    ids=["t5", "vit"],
)
def test_model_that_reads_no_text_alone_is_refused(config: T5Config | ViTConfig, message: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=message):
        ModelShell.open(tmp_path)


def test_integer_dtype_is_refused(llama: Path) -> None:
    with pytest.raises(UsageError, match="float dtype"):
        ModelShell.open(llama, dtype=torch.int8)


def test_missing_folder_offers_near_names(llama: Path) -> None:
    with pytest.raises(ModelError, match=r"Did you mean .*llama"):
        ModelShell.open(llama.parent / "lama")


def test_file_instead_of_a_folder_is_refused(llama: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        ModelShell.open(llama / "config.json")


def test_hub_name_that_cannot_be_fetched_is_a_model_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ModelError, match=r"no-such-org/no-such-model.*no network"):
        ModelShell.open("no-such-org/no-such-model")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model_type": "no-such-model"}', '{"model_type": 3}'])
def test_config_that_is_none_is_a_model_error(llama: Path, text: str) -> None:
    (llama / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelShell.open(llama)


def test_config_that_is_missing_is_a_model_error(llama: Path) -> None:
    (llama / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        ModelShell.open(llama)


def test_code_that_comes_with_a_model_is_never_run(llama: Path) -> None:
    edit_config(llama, model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    (llama / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match="does not accept"):
        ModelShell.open(llama)


def test_model_that_skips_a_block_is_refused() -> None:
    model = make_model("llama")

    class Skipping(type(model)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            layers, self.model.layers = self.model.layers, self.model.layers[:1]
            try:
                return super().forward(*args, **kwargs)
            finally:
                self.model.layers = layers

    skipping: PreTrainedModel = copy.deepcopy(model)
    skipping.__class__ = Skipping
    with pytest.raises(StructureError, match="did not call each of its 2 blocks"):
        ModelShell.open(skipping)
