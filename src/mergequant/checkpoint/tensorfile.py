"""Safetensors files: headers read strictly, files written and merged as streams.

A file is 8 bytes with the header's length (little endian), a JSON header, and the tensors' bytes one after another.
Reading the header by hand lets every fault be named; writing by hand lets shards be joined by copying byte ranges, so
that no shard has to fit into memory. Tensors lie in order of falling element size, then of name: all stay aligned, and
equal content gives equal bytes. Format: the safetensors README (huggingface/safetensors).
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergequant.errors import CheckpointError

__all__ = ["Entry", "TensorFile", "read_header", "write_tensors"]

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 1 << 24  # bytes copied at a time
LENGTH_BYTES = 8
LARGEST_HEADER = 100_000_000  # the safetensors library refuses more


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: `start` counts from the beginning of the file, `text` is its share of the header."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int
    text: int


@dataclass(frozen=True)
class TensorFile:
    """Header of one safetensors file: its tensors, and the bytes that are not tensor data."""

    path: Path
    entries: dict[str, Entry]
    overhead: int


def read_header(path: Path) -> TensorFile:
    """Read a header and check that the file holds exactly what it promises.

    Raises:
        CheckpointError: naming the file, where it is missing, truncated, or its header contradicts itself.
    """
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if total < LENGTH_BYTES or length > min(total - LENGTH_BYTES, LARGEST_HEADER):
                raise _broken(path, f"its header claims {length} bytes and the file has {total}")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror}); fetch or write the checkpoint again"
        ) from error
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:
        raise _broken(path, f"its header is no JSON object with unique names ({error})") from error
    if not isinstance(header, dict):
        raise _broken(path, f"its header is a {type(header).__name__} instead of an object")
    header.pop("__metadata__", None)
    overhead = LENGTH_BYTES + length
    entries = {name: _entry(path, name, value, overhead) for name, value in header.items()}
    end = overhead
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != end:
            raise _broken(path, f"tensor {name!r} starts at byte {entry.start} instead of {end}")
        end += entry.size
    if end != total:
        raise _broken(path, f"its header promises {end} bytes and the file has {total}")
    return TensorFile(path, entries, overhead)


def write_tensors(path: Path, tensors: Mapping[str, Tensor | Entry]) -> tuple[int, str]:
    """Write a safetensors file from tensors in memory and from tensors that lie in other files.

    The caller picks a temporary name and moves the file; the data is on disk (fsync) when this returns.

    Returns:
        The file's size in bytes, and its sha256.

    Raises:
        CheckpointError: a dtype that the format does not know.
        OSError: the disk refused.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise CheckpointError(f"{name}: {tensor.dtype} cannot be stored; cast it to one of {', '.join(DTYPES)}")
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    digest = hashlib.sha256()
    size = 0
    with path.open("wb") as file:
        for piece in _pieces(len(text).to_bytes(LENGTH_BYTES, "little") + text, ordered):
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _pieces(head: bytes, ordered: list[tuple[str, Tensor | Entry]]) -> Iterator[bytes | memoryview]:
    yield head
    for _, tensor in ordered:
        if isinstance(tensor, Tensor):
            flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            yield flat.numpy().data
            continue
        with tensor.path.open("rb") as file:
            file.seek(tensor.start)
            left = tensor.size
            while left:
                piece = file.read(min(left, PIECE))
                if not piece:
                    raise CheckpointError(f"{tensor.path}: became shorter while it was copied; run again")
                left -= len(piece)
                yield piece


def _entry(path: Path, name: str, value: Any, overhead: int) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"the entry of tensor {name!r} is not dtype, shape and data_offsets")
    dtype, shape, offsets = DTYPES.get(str(value["dtype"])), value["shape"], value["data_offsets"]
    if dtype is None:
        raise _broken(path, f"tensor {name!r} has dtype {value['dtype']!r}; known are {', '.join(DTYPES)}")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise _broken(path, f"tensor {name!r} has shape {shape!r} and offsets {offsets!r}")
    size = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != size:
        raise _broken(path, f"tensor {name!r} needs {size} bytes and has {offsets[1] - offsets[0]}")
    text = len(json.dumps({name: value}, separators=(",", ":"))) - 1
    return Entry(path, dtype, tuple(shape), overhead + offsets[0], size, text)


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice")
    return out


def _broken(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path}: corrupt or truncated safetensors file: {why}; fetch or write the checkpoint again")
