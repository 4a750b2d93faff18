"""Read text from files, folders and the hub, piece by piece.

Text is UTF-8, strictly: a wrong byte is an error with its place, never a replacement character, because a silently
damaged calibration text costs accuracy that nobody can explain later. A `.txt` file is one document; a record of a
`.jsonl` or `.parquet` file is one document; documents are joined by an empty line.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mergequant.data.spec import SUFFIXES, HubSource, PathSource, Source, TextSource
from mergequant.errors import DataError

__all__ = ["SEPARATOR", "iterate_documents", "iterate_text", "list_files"]

SEPARATOR = "\n\n"
_READ = 1 << 20


def iterate_text(source: Source) -> Iterator[str]:
    """Yield the text of a source in order, in fragments of at most about 1 MiB (a record may be longer).

    Documents are separated by an empty line. Raises `DataError` when there is no text at all, when a file is not UTF-8,
    not what its suffix says, or has no field to take the text from.
    """
    some = False
    if isinstance(source, PathSource):
        for file in list_files(source.path):
            if some:
                yield SEPARATOR
            file_has_text = False
            for fragment in _iterate_file(file):
                file_has_text = file_has_text or not fragment.isspace()
                yield fragment
            if not file_has_text:
                raise DataError(f"data {str(file)!r}: the file holds no text; remove it or give another.")
            some = True
        return
    documents = _hub_documents(source) if isinstance(source, HubSource) else _given_documents(source)
    for document in documents:
        if some:
            yield SEPARATOR
        yield document
        some = True
    if not some:
        raise DataError(f"data {source}: holds no text; give another source.")


def iterate_documents(source: Source) -> Iterator[str]:
    """Yield whole documents: files for `.txt`, records otherwise. For callers that need document borders."""
    if isinstance(source, PathSource):
        for file in list_files(source.path):
            yield from (["".join(_iterate_file(file))] if file.suffix.lower() == ".txt" else _records(file))
    else:
        yield from _hub_documents(source) if isinstance(source, HubSource) else _given_documents(source)


def list_files(path: Path) -> list[Path]:
    """The readable files of a path: itself, or all below a folder in sorted order. `DataError` if there is none."""
    if path.is_file():
        return [path]
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f"data {str(path)!r}: the folder holds no {', '.join(SUFFIXES)} file; give another folder.")
    return files


def _given_documents(source: Source) -> Iterator[str]:
    if not isinstance(source, TextSource):
        raise DataError(f"data {source}: this source has tokens, not text.")
    yield from (text for text in source.texts if text)


def _iterate_file(file: Path) -> Iterator[str]:
    if file.suffix.lower() == ".txt":
        yield from _plain_text(file)
        return
    for index, record in enumerate(_records(file)):
        if index:
            yield SEPARATOR
        yield record


def _records(file: Path) -> Iterator[str]:
    return _jsonl_records(file) if file.suffix.lower() == ".jsonl" else _parquet_records(file)


def _plain_text(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8-sig") as stream:  # a byte-order mark is not text
            while fragment := stream.read(_READ):
                yield fragment
    except UnicodeDecodeError as error:
        raise _not_utf8(file, error) from error
    except OSError as error:
        raise DataError(f"data {str(file)!r}: cannot be read ({error.strerror}).") from error


def _not_utf8(file: Path, error: UnicodeDecodeError) -> DataError:
    """Name the byte in the file; the decoder only knows its place within a chunk."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    with file.open("rb") as stream:
        while chunk := stream.read(_READ):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as exact:
                done += exact.start - pending
                break
            done += len(chunk)
        else:  # the last character is cut off at the end of the file
            done -= len(decoder.getstate()[0])
    return DataError(
        f"data {str(file)!r}: not UTF-8 at byte offset {done} ({error.reason}); "
        "convert it first, e.g. `iconv -f LATIN1 -t UTF-8`."
    )


def _text_field(fields: list[str], text_fields: list[str], where: str) -> str:
    """The field that holds the text: `text`, or the only string field."""
    if "text" in text_fields:
        return "text"
    if len(text_fields) == 1:
        return text_fields[0]
    raise DataError(
        f"data {where}: no field `text`, and {len(text_fields)} string fields to choose from "
        f"(fields: {', '.join(fields) or 'none'}); rename the one that holds the text to `text`."
    )


def _field_of_record(record: Any, where: str) -> str:
    if not isinstance(record, dict):
        raise DataError(f"data {where}: expected a JSON object with a field `text`, found {type(record).__name__}.")
    return _text_field(list(record), [key for key, value in record.items() if isinstance(value, str)], where)


def _jsonl_records(file: Path) -> Iterator[str]:
    field = None
    try:
        with file.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                where = f"{str(file)!r} line {number}"
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"data {where}: not JSON ({error.msg} at column {error.colno}).") from error
                if field is None:
                    field = _field_of_record(record, where)
                value = record.get(field) if isinstance(record, dict) else None
                if not isinstance(value, str):
                    raise DataError(f"data {where}: field {field!r} is missing or not a string.")
                if value:
                    yield value
    except UnicodeDecodeError as error:
        raise _not_utf8(file, error) from error
    except OSError as error:
        raise DataError(f"data {str(file)!r}: cannot be read ({error.strerror}).") from error


def _parquet_records(file: Path) -> Iterator[str]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(
            f"data {str(file)!r}: reading parquet needs pyarrow; run `pip install mergequant[data]`."
        ) from error
    try:
        with pq.ParquetFile(file) as table:
            schema = table.schema_arrow
            strings = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
            field = _text_field(list(schema.names), strings, repr(str(file)))
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                yield from (value for value in batch.column(0).to_pylist() if value)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"data {str(file)!r}: not a readable parquet file ({error}).") from error


def _hub_documents(source: HubSource) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"data {source}: needs the `datasets` library; run `pip install mergequant[data]`.") from error
    try:
        # Slices such as train[:10%] are not available on streams.
        stream = datasets.load_dataset(
            source.name, source.config, split=source.split, streaming="[" not in source.split
        )
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"data {source}: cannot be loaded ({type(error).__name__}: {error}); "
            "check name, config, split and the network, or give a local file."
        ) from error
    field = None
    for record in stream:
        if field is None:
            field = _field_of_record(record, str(source))
        if value := record[field]:
            yield value
