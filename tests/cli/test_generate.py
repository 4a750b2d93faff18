from pathlib import Path
from typing import Any

import pytest

from mergequant.assets import TINY
from mergequant.cli.generate import prompt_tokens
from mergequant.eval import load_tokenizer


@pytest.mark.parametrize("static", [[], ["--static-cache"]])
def test_generate_continues_prompt(run: Any, checkpoint: Path, static: list[str]) -> None:
    result = run("generate", checkpoint, "The river", "--max-new-tokens", "5", *static)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("The river")
    assert len(result.stdout) > len("The river")
    assert "<s>" not in result.stdout
    assert "5 tokens in" in result.stderr


def test_generate_when_kv_is_given_runs_on_the_fast_loop(
    run: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["generate", checkpoint, "The river", "--temperature", "0", "--max-new-tokens", "8"]
    texts = [run(*arguments, "--dtype", "float32", *kv).stdout for kv in ([], ["--kv", "16"])]
    assert texts[0] == texts[1]
    monkeypatch.setattr("mergequant.integrations.transformers.extract.MODEL_TYPES", ("other",))
    refused = run("generate", checkpoint, "a", "--kv", "16")
    assert refused.exit_code == 2
    assert "fast loop" in refused.stderr


def test_generate_with_same_seed_writes_same(run: Any, checkpoint: Path) -> None:
    arguments = ["generate", checkpoint, "The river", "--max-new-tokens", "8", "--seed"]
    texts = [run(*arguments, seed).stdout for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_generate_reads_prompt_from_stdin(run: Any) -> None:
    result = run("generate", "tiny", "-", "--max-new-tokens", "2", "--temperature", "0", input="The town")
    assert result.stdout.startswith("The town")


def test_generate_without_prompt_begins_with_bos(run: Any) -> None:
    result = run("generate", "tiny", "--max-new-tokens", "2")
    assert result.exit_code == 0, result.output


def test_prompt_tokens_has_one_bos() -> None:
    tokenizer = load_tokenizer(TINY)
    tokens = prompt_tokens(tokenizer, "The river")[0].tolist()
    assert tokens[0] == tokenizer.bos_token_id
    assert tokens.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["tiny", "a", "--max-new-tokens", "3000"], 2, "2048 positions"),
        (["tiny", "a", "--max-new-tokens", "0"], 2, "--max-new-tokens"),
        (["tiny", "a", "--temperature", "-1"], 2, "--temperature"),
        (["tiny", "a", "--temprature", "1"], 2, "--temperature"),
        (["tiny", "a", "--kv", "8"], 2, "float one"),
        (["tiny", "a", "--kv", "5"], 2, "--kv"),
        (["tiny", "a", "b"], 2, "b"),
        ([], 2, "DIR"),
        (["./nowhere", "a"], 1, "nowhere"),
    ],
)
def test_generate_wrong_use_is_named(run: Any, arguments: list[str], status: int, words: str) -> None:
    result = run("generate", *arguments)
    assert result.exit_code == status, result.output
    assert words in result.stderr
