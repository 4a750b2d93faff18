"""Safetensors files written and read by hand agree with the safetensors library."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergequant.checkpoint.tensorfile import read_header, write_tensors
from mergequant.errors import CheckpointError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int8, torch.uint8, torch.float64, torch.bool]


def _tensors() -> dict[str, torch.Tensor]:
    tensors = {f"t{number}": torch.arange(6).reshape(2, 3).to(dtype) for number, dtype in enumerate(DTYPES)}
    return {**tensors, "empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5), "strided": torch.rand(4, 6)[:, ::2]}


def _raw(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def test_write_tensors_when_read_by_the_library_gives_equal_tensors(tmp_path: Path) -> None:
    size, _ = write_tensors(tmp_path / "a", _tensors())
    loaded = load_file(tmp_path / "a")
    assert size == (tmp_path / "a").stat().st_size
    assert set(loaded) == set(_tensors())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in load_file(tmp_path / "a").items())
    assert torch.equal(loaded["t1"], _tensors()["t1"])


def test_write_tensors_when_files_are_joined_gives_the_same_bytes_as_from_memory(tmp_path: Path) -> None:
    tensors = _tensors()
    names = sorted(tensors)
    write_tensors(tmp_path / "a", {name: tensors[name] for name in names[:5]})
    save_file({name: tensors[name].contiguous() for name in names[5:]}, tmp_path / "b")
    entries = {**read_header(tmp_path / "a").entries, **read_header(tmp_path / "b").entries}
    assert write_tensors(tmp_path / "joined", entries) == write_tensors(tmp_path / "whole", tensors)
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "whole").read_bytes()


def test_write_tensors_when_dtype_is_unknown_names_the_tensor(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"layer\.weight: torch\.complex64"):
        write_tensors(tmp_path / "a", {"layer.weight": torch.zeros(2, dtype=torch.complex64)})


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "data", "match"),
    [
        ({"a": ENTRY}, b"1234567", "promises"),
        ({"a": ENTRY}, b"123456789", "promises"),
        ({"a": {**ENTRY, "data_offsets": [4, 12]}}, b"0" * 12, "starts at byte"),
        ({"a": {**ENTRY, "shape": [3]}}, b"0" * 8, "needs 12 bytes and has 8"),
        ({"a": {**ENTRY, "shape": [-2]}}, b"0" * 8, "shape"),
        ({"a": {**ENTRY, "dtype": "Q4"}}, b"0" * 8, "Q4"),
        ({"a": {"dtype": "F32"}}, b"", "not dtype, shape and data_offsets"),
        ({"a": ENTRY, "b": ENTRY}, b"0" * 8, "starts at byte"),
        ([1], b"", "list instead of an object"),
    ],
)
def test_read_header_when_it_contradicts_the_file_names_both(
    header: object, data: bytes, match: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        read_header(_raw(tmp_path / "bad.safetensors", json.dumps(header).encode(), data))
    assert "bad.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "claims 0 bytes"),
        (b"\xff" * 8 + b"{}", "claims"),
        ((2).to_bytes(8, "little") + b"{]", "no JSON object"),
        ((2).to_bytes(8, "little") + b"\xff\xff", "no JSON object"),
        ((19).to_bytes(8, "little") + b'{"a": {}, "a": {}} ', "'a' appears twice"),
    ],
)
def test_read_header_when_bytes_are_corrupt_names_the_file(content: bytes, match: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=match):
        read_header(path)


def test_read_header_when_file_is_missing_names_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors"):
        read_header(tmp_path / "gone.safetensors")
