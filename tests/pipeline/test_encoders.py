"""Encoders from a folder with a tokenizer and text to a checkpoint, and what cannot be done with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

import mergequant
from families import ENCODERS, make_model
from mergequant.checkpoint import open_checkpoint
from mergequant.cli import main
from mergequant.errors import StructureError, UsageError
from mergequant.pipeline import Quantized
from mergequant.pipeline import run as pipeline_run

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
WINDOWS = {"samples": 4, "seqlen": 24}


def save_with_tokenizer(family: str, folder: Path) -> Path:
    """A model with a tokenizer of words like BERT's: [CLS] first, [SEP] last, no BOS."""
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *(f"w{n}" for n in range(93))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )
    tokenizer.save_pretrained(folder)
    make_model(family).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    numbers = torch.randint(93, (2000,), generator=torch.Generator().manual_seed(3)).tolist()
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{number}" for number in numbers), encoding="utf-8")
    return path


@pytest.mark.parametrize("family", ENCODERS)
def test_quantize_from_text_expect_windows_that_begin_with_the_class_token(
    family: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_with_tokenizer(family, tmp_path / "model")
    drawn: list[Tensor] = []
    real = pipeline_run._draw

    def draw(*args: Any) -> Any:
        found = real(*args)
        drawn.extend(windows.tokens for windows in found)
        return found

    monkeypatch.setattr(pipeline_run, "_draw", draw)
    made = mergequant.quantize(folder, "smoothquant", data=str(text), out=tmp_path / "out", **WINDOWS)
    assert all(bool((tokens[:, 0] == 1).all()) and int(tokens[:, 1:].min()) > 3 for tokens in drawn)
    figures = made.figures["held_out"]
    assert 0 < figures["hidden_states_error"] < 0.05
    assert ("kl_mean" in figures) == (family == "bert_classifier")
    assert "nll_increase" not in figures
    assert made.figures["kept_float"] == {}

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = tokenizer(["w1 w2 w3", "w4 w5 w6 w7 w8"], return_tensors="pt", padding=True)
    with torch.no_grad():
        found, exact = dict(made.model(**batch)), dict(make_model(family)(**batch))
    assert all(float((found[name] - exact[name]).norm() / exact[name].norm()) < 0.05 for name in exact)
    assert "generate" not in (tmp_path / "out" / "README.md").read_text()
    again = made.model.save_pretrained(tmp_path / "again") or mergequant.load(tmp_path / "again")
    with torch.no_grad():
        assert all(torch.equal(value, found[name]) for name, value in again(**batch).items())


def test_checkpoint_of_a_classifier_opens_without_its_head_and_a_bare_one_with_a_new_head(
    tmp_path: Path, run: Callable[..., Quantized], windows: Callable[..., Tensor]
) -> None:
    tokens = windows(make_model("bert"), 2, 9)
    run(make_model("bert_classifier"), "gptq", tmp_path / "classifier")
    run(make_model("bert"), "gptq", tmp_path / "bare")
    for folder, auto in (("classifier", AutoModel), ("bare", AutoModelForSequenceClassification)):
        whole, other = mergequant.load(tmp_path / folder), auto.from_pretrained(tmp_path / folder).eval()
        with torch.no_grad():
            first, second = (
                getattr(model, model.base_model_prefix, model)(tokens).last_hidden_state for model in (whole, other)
            )
        assert torch.equal(first, second)


def test_quantize_an_encoder_on_its_own_text_is_refused(tmp_path: Path) -> None:
    folder = save_with_tokenizer("bert", tmp_path / "model")
    with pytest.raises(UsageError, match=r"BertModel writes no text.*--data FILE"):
        mergequant.quantize(folder, "gptq", **WINDOWS)


def test_plan_of_a_recipe_with_a_prefix_names_recipes_that_work() -> None:
    with pytest.raises(StructureError, match=r"layer\.0: every token sees the whole text.*smoothquant or gptq"):
        mergequant.plan(make_model("bert"), "mergequant-plus", **WINDOWS)
    planned = mergequant.plan(make_model("bert"), "mergequant", **WINDOWS)
    assert [site.kind for site in planned.sites[:4]] == ["stream", "attention_output", "stream", "mlp_output"]
    assert planned.sites[0].inputs == "int4 static per channel"


def test_command_lines_on_an_encoder_say_what_they_can_and_cannot(text: Path, tmp_path: Path) -> None:
    def command(*words: object) -> Any:
        return CliRunner().invoke(main, [str(word) for word in words], prog_name="mergequant")

    folder, out = save_with_tokenizer("bert", tmp_path / "model"), tmp_path / "out"
    options = ["--data", text, "--samples", 4, "--seqlen", 24]
    result = command("quantize", folder, "--recipe", "gptq", "--out", out, *options)
    assert result.exit_code == 0, result.output
    shown = " ".join(result.stdout.split())
    assert "hidden states off by" in shown
    assert "mergequant.load(" in shown
    assert "mergequant eval" not in shown
    for words in (["eval", out, "--data", text], ["eval", folder, "--data", text], ["generate", out, "w1"]):
        result = command(*words)
        assert result.exit_code == 2
        assert "BertModel predicts no next token" in " ".join(result.stderr.split())
        assert ("last_hidden_state" in result.stderr) == (words[1] == out)
    assert json.loads((out / "config.json").read_text())["architectures"] == ["BertModel"]
    assert open_checkpoint(out).quantization.kv is None
