import json
import sys
from pathlib import Path

import pytest

from mergequant.data.sources import iterate_documents, iterate_text
from mergequant.data.spec import HubSource, PathSource, TextSource
from mergequant.errors import DataError


def read(path: Path) -> str:
    return "".join(iterate_text(PathSource(path)))


def test_text_when_utf8_with_bom_and_crlf_is_plain(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffgrüße\r\nzwei".encode())
    assert read(file) == "grüße\nzwei"


@pytest.mark.parametrize("offset", [0, 5, (1 << 20) - 1, (1 << 20) + 7])
def test_text_when_not_utf8_names_the_byte(tmp_path: Path, offset: int) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"a" * offset + b"\xff" + b"b" * 100)
    with pytest.raises(DataError, match=f"a.txt.*byte offset {offset} "):
        read(file)


def test_text_when_last_character_is_cut_off_names_its_first_byte(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"abc" + "€".encode()[:2])
    with pytest.raises(DataError, match="byte offset 3 "):
        read(file)


def test_text_when_character_straddles_a_chunk_is_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    text = "a" * ((1 << 20) - 1) + "€ende"
    file.write_text(text, encoding="utf-8")
    assert read(file) == text
    file.write_bytes(text.encode() + b"\xff")
    with pytest.raises(DataError, match=f"byte offset {len(text.encode())} "):
        read(file)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_when_file_is_empty_raises(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(" \n\n")
    with pytest.raises(DataError, match="no text"):
        read(tmp_path / name)


def test_text_when_folder_reads_files_in_order_and_joins_documents(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.jsonl").write_text('{"text": "three"}\n\n{"text": "four"}\n')
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "ignored.md").write_text("no")
    assert read(tmp_path) == "one\n\ntwo\n\nthree\n\nfour"
    assert list(iterate_documents(PathSource(tmp_path))) == ["one", "two", "three", "four"]


def test_text_when_folder_has_nothing_readable_raises(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("x")
    with pytest.raises(DataError, match=r"no \.txt"):
        read(tmp_path)


def test_jsonl_when_one_string_field_uses_it(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1, "body": "x"}\n{"id": 2, "body": "y"}\n')
    assert read(tmp_path / "a.jsonl") == "x\n\ny"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"title": "a", "body": "b"}', "title, body"),
        ('{"id": 1}', "id"),
        ("[1]", "line 1.*list"),
        ('{"text": "a"}\n{"text": 5}', "line 2.*text"),
        ('{"text": "a"}\n{"text": ', "line 2.*not JSON"),
    ],
)
def test_jsonl_when_record_is_unusable_names_line_and_fields(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.jsonl")


def test_parquet_when_text_column_is_read_and_others_refused(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"n": [1, 2, 3], "text": ["a", None, "b"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == "a\n\nb"
    pq.write_table(pa.table({"x": ["1"], "y": ["2"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="x, y"):
        read(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=r"c\.parquet.*not a readable parquet"):
        read(tmp_path / "c.parquet")


def test_given_texts_when_empty_raises() -> None:
    assert "".join(iterate_text(TextSource(("a", "", "b")))) == "a\n\nb"
    with pytest.raises(DataError, match="no text"):
        list(iterate_text(TextSource(())))


def test_optional_libraries_when_missing_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install mergequant\[data\]"):
        list(iterate_text(HubSource("x")))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"pip install mergequant\[data\]"):
        read(tmp_path / "a.parquet")


def test_hub_when_loaded_takes_text_field(monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeDatasets:
        @staticmethod
        def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> list[dict[str, object]]:
            if name == "missing":
                raise FileNotFoundError(name)
            return [{"text": json.dumps([name, config, split, streaming])}]

    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets)
    assert json.loads("".join(iterate_text(HubSource("a/b", "c", "test[:1%]")))) == ["a/b", "c", "test[:1%]", False]
    with pytest.raises(DataError, match=r"hf:missing.*network"):
        list(iterate_text(HubSource("missing")))
