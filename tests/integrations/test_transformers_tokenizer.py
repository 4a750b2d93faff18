"""A saved tokenizer adds the BOS that a prefix stands for."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mergequant.errors import InputError
from mergequant.integrations.transformers import set_bos_in_tokenizer


def _tokenizer(first: str = "", last: str = "") -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "<unk>": 4}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    if first or last:
        names = {"<s>": 0, "</s>": 1}
        text = f"{first} $A {last}".strip()
        backend.post_processor = TemplateProcessing(
            single=text, pair=f"{text} $B:1", special_tokens=[(n, names[n]) for n in (first, last) if n]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(("last", "want"), [("", [0, 2, 3]), ("</s>", [0, 2, 3, 1])])
def test_set_bos_when_tokenizer_adds_none_adds_it_for_good(last: str, want: list[int], tmp_path: Path) -> None:
    tokenizer = _tokenizer(last=last)
    assert set_bos_in_tokenizer(tokenizer, 0)
    assert tokenizer("a b")["input_ids"] == want
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded("a b")["input_ids"] == want
    assert loaded("a b", add_special_tokens=False)["input_ids"] == [2, 3]
    assert not set_bos_in_tokenizer(loaded, 0)


def test_set_bos_when_tokenizer_is_byte_level_keeps_its_processor() -> None:
    tokenizer = _tokenizer()
    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)
    assert set_bos_in_tokenizer(tokenizer, 0)
    assert tokenizer("a b")["input_ids"] == [0, 2, 3]
    assert tokenizer("a", "b")["input_ids"] == [0, 2, 3]
    assert "ByteLevel" in tokenizer.backend_tokenizer.to_str()


def test_set_bos_when_tokenizer_adds_it_already_changes_nothing() -> None:
    tokenizer = _tokenizer(first="<s>")
    assert not set_bos_in_tokenizer(tokenizer, 0)
    assert tokenizer("a")["input_ids"] == [0, 2]


def test_set_bos_when_another_token_is_first_refuses() -> None:
    with pytest.raises(InputError, match="token 1"):
        set_bos_in_tokenizer(_tokenizer(first="</s>"), 0)
