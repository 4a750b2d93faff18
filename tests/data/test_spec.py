from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergequant.data.spec import DataSpec, HubSource, Part, PathSource, SelfSource, TextSource, as_data_spec, parse_data
from mergequant.errors import DataError, UsageError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("notes.txt", "a+b*2.txt", "facts.jsonl"):
        (tmp_path / name).write_text("text")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "sources", "weights"),
    [
        ("self", [SelfSource()], [1.0]),
        ("notes.txt", [PathSource(Path("notes.txt"))], [1.0]),
        ("a+b*2.txt", [PathSource(Path("a+b*2.txt"))], [1.0]),
        ("self+notes.txt", [SelfSource(), PathSource(Path("notes.txt"))], [1.0, 1.0]),
        ("self*0.25 + facts.jsonl*3", [SelfSource(), PathSource(Path("facts.jsonl"))], [0.25, 3.0]),
        ("hf:org/name", [HubSource("org/name")], [1.0]),
        ("hf:org/name:test", [HubSource("org/name", None, "test")], [1.0]),
        ("hf:org/name:test[:10%]", [HubSource("org/name", None, "test[:10%]")], [1.0]),
        ("hf:org/name:en", [HubSource("org/name", "en")], [1.0]),
        ("hf:org/name::odd_split", [HubSource("org/name", None, "odd_split")], [1.0]),
        ("hf:org/name:en:validation", [HubSource("org/name", "en", "validation")], [1.0]),
    ],
)
def test_parse_when_valid_gives_sources_and_round_trips(
    folder: Path, text: str, sources: list[object], weights: list[float]
) -> None:
    spec = parse_data(text)
    assert [part.source for part in spec.parts] == sources
    assert [part.weight for part in spec.parts] == weights
    assert parse_data(str(spec)) == spec


@pytest.mark.parametrize(
    "text", ["", " ", "self*zero", "self*0", "self*-1", "self*nan", "self+", "+self", "hf:", "hf:a:b:c:d", "self*inf"]
)
def test_parse_when_malformed_raises_usage_error(folder: Path, text: str) -> None:
    with pytest.raises(UsageError):
        parse_data(text)


@pytest.mark.parametrize(
    ("text", "hint"),
    [("note.txt", "notes.txt"), ("slef", "self"), ("nowhere/x.txt", "nowhere"), ("self*1+fact.jsonl*1", "facts.jsonl")],
)
def test_parse_when_path_is_misspelt_names_the_near_one(folder: Path, text: str, hint: str) -> None:
    with pytest.raises(DataError, match=hint):
        parse_data(text)


def test_parse_when_suffix_is_unknown_names_the_known_ones(folder: Path) -> None:
    (folder / "x.docx").write_text("x")
    with pytest.raises(DataError, match=r"\.docx.*\.parquet"):
        parse_data("x.docx")


def test_as_data_spec_when_given_texts_or_tokens_wraps_them() -> None:
    assert as_data_spec(["a", "b"]).parts[0].source == TextSource(("a", "b"))
    tokens = torch.arange(6).view(2, 3)
    assert as_data_spec(tokens).parts[0].source.tokens is not None  # type: ignore[union-attr]
    for wrong in (torch.zeros(2, 3), torch.arange(3), 5, [1, 2]):
        with pytest.raises(UsageError):
            as_data_spec(wrong)  # type: ignore[arg-type]


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(0, 500))
def test_share_when_weights_are_any_adds_up_and_is_proportional(weights: list[float], samples: int) -> None:
    counts = DataSpec(tuple(Part(SelfSource(), weight) for weight in weights)).share(samples)
    assert sum(counts) == samples
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - samples * weight / sum(weights)) < 1
