"""A tokenizer whose tokens are the numbers in the text: every token tells where it stood."""

from typing import Any

import pytest


class CountingTokenizer:
    """Token ids are the integers that the text spells; BOS is 0."""

    def __init__(self, bos_token_id: int | None = 0, vocabulary: int = 64) -> None:
        self.bos_token_id, self.vocabulary = bos_token_id, vocabulary
        self.characters_seen = 0

    def __len__(self) -> int:
        return self.vocabulary

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        assert options["add_special_tokens"] is False
        self.characters_seen += len(text)
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.fixture
def tokenizer() -> CountingTokenizer:
    return CountingTokenizer()


@pytest.fixture
def tokenizer_without_bos() -> CountingTokenizer:
    return CountingTokenizer(bos_token_id=None)
