"""The writer: whole or nothing, resumable to the byte, and careful with what is not ours."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mergequant.checkpoint import CheckpointWriter, files, open_checkpoint, writer
from mergequant.errors import CheckpointError, UsageError


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_finish_when_all_blocks_are_written_gives_a_valid_folder(
    write: Callable[..., Path], block: Any, tail: Any
) -> None:
    out = write()
    checkpoint = open_checkpoint(out)
    checkpoint.validate()
    assert {path.name for path in out.iterdir()} == {"README.md", "config.json", "model.safetensors", "x.bin"}
    for name, tensor in {**block(0)[0], **block(1)[0], **tail}.items():
        assert torch.equal(checkpoint.get(name), tensor)
    assert checkpoint.quantization.provenance == {"seed": 0, "fingerprint": "f"}
    assert not out.with_name("out.partial").exists()


def test_finish_when_shards_are_small_splits_by_block(
    write: Callable[..., Path], block: Any, tail: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "LARGEST_SHARD", 600)
    out = write()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    assert index["weight_map"]["model.layers.0.mlp.weight_codes"] == "model-00001-of-00003.safetensors"
    whole = {**block(0)[0], **block(1)[0], **tail}
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values())
    loaded = open_checkpoint(out).tensors()
    assert set(loaded) == set(whole)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in whole.items())


def test_resume_when_stopped_after_a_block_gives_identical_bytes(write: Callable[..., Path], tmp_path: Path) -> None:
    whole = write(tmp_path / "whole")
    write(tmp_path / "resumed", blocks=1)
    with CheckpointWriter(tmp_path / "resumed", "f") as again:
        assert again.done == 1
        assert not again.finished
        assert again.block_record(0)["figures"] == {"loss": 0.0}
        assert "model.layers.0.norm.index" in again.block_tensors(0)
        with pytest.raises(CheckpointError, match="block 1 is not written"):
            again.block_tensors(1)
    assert _bytes(write(tmp_path / "resumed")) == _bytes(whole)


@pytest.mark.parametrize("damage", ["tensors", "record", "missing"])
def test_resume_when_a_block_is_damaged_writes_it_again(
    damage: str, write: Callable[..., Path], tmp_path: Path, config: Any, tail: Any, block: Any
) -> None:
    whole = write(tmp_path / "whole")
    out = tmp_path / "out"
    with CheckpointWriter(out, "f") as first:
        for index in range(2):
            first.write_block(index, *block(index))
    path = tmp_path / "out.partial" / "block-00000.safetensors"
    if damage == "tensors":
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    elif damage == "record":
        path.with_suffix(".json").write_text("{")
    else:
        path.unlink()
    with CheckpointWriter(out, "f") as again:
        assert again.done == 0
        again.write_block(0, *block(0))
    assert _bytes(write(out)) == _bytes(whole)


KILLED = """
import os, signal, sys, torch
from mergequant.checkpoint import CheckpointWriter, writer
with CheckpointWriter(sys.argv[1], "f") as run:
    run.write_block(0, {"a": torch.ones(3)}, {"layers": {}})
    writer.write_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # after the tensors, before their record
    run.write_block(1, {"b": torch.ones(3)}, {"layers": {}})
"""


def test_resume_when_killed_in_the_middle_of_a_block_goes_on_after_the_last_whole_one(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "out"], check=False, timeout=100)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "out.partial" / "block-00001.safetensors").exists()
    assert not (tmp_path / "out.partial" / "config.json").exists()
    with CheckpointWriter(tmp_path / "out", "f") as again:
        assert again.done == 1
        assert torch.equal(again.block_tensors(0)["a"], torch.ones(3))


def test_open_when_fingerprint_differs_starts_anew(write: Callable[..., Path], tmp_path: Path) -> None:
    write(blocks=1)
    with CheckpointWriter(tmp_path / "out", "another") as again:
        assert again.done == 0
    assert not (tmp_path / "out.partial").exists()  # nothing was written: nothing stays


def test_open_when_resume_is_off_starts_anew(write: Callable[..., Path], tmp_path: Path) -> None:
    write(blocks=1)
    with CheckpointWriter(tmp_path / "out", "f", resume=False) as again:
        assert again.done == 0


def test_open_when_partial_holds_foreign_file_refuses_and_keeps_it(write: Callable[..., Path], tmp_path: Path) -> None:
    write(blocks=1)
    (tmp_path / "out.partial" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"notes\.txt"), CheckpointWriter(tmp_path / "out", "another"):
        pass
    assert (tmp_path / "out.partial" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "out.partial" / "block-00000.safetensors").exists()


def test_open_when_another_process_writes_refuses(tmp_path: Path) -> None:
    with (
        CheckpointWriter(tmp_path / "out", "f"),
        pytest.raises(CheckpointError, match=r"out\.partial: another process"),
        CheckpointWriter(tmp_path / "out", "f"),
    ):
        pass


def test_open_when_finished_says_so_and_leaves_bytes_alone(write: Callable[..., Path]) -> None:
    before = _bytes(write())
    with CheckpointWriter(write(), "f") as again:
        assert again.finished
    assert _bytes(write()) == before


def test_open_when_interrupted_while_tidying_up_tidies_up(write: Callable[..., Path], tmp_path: Path) -> None:
    out = write()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "block-00000.json").write_text("{}")
    with CheckpointWriter(out, "f") as again:
        assert again.finished
    assert not (tmp_path / "out.partial").exists()


def test_open_when_out_is_empty_folder_uses_it(write: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    open_checkpoint(write()).validate()


@pytest.mark.parametrize("content", ["", "{}", '{"quantization_config": {"quant_method": "gptq"}}', "not json"])
@pytest.mark.parametrize("resume", [True, False])
def test_open_when_out_is_not_ours_leaves_it_untouched(content: str, resume: bool, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(content)
    with pytest.raises(UsageError, match="no mergequant checkpoint"):
        CheckpointWriter(out, "f", resume=resume)
    assert _bytes(out) == {"config.json": content.encode()}


def test_open_when_out_is_a_file_refuses(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(UsageError, match="choose another --out"):
        CheckpointWriter(tmp_path / "out", "f", resume=False)


def test_open_when_out_is_another_checkpoint_names_its_recipe(write: Callable[..., Path], tmp_path: Path) -> None:
    before = _bytes(write())
    with pytest.raises(UsageError, match=r"'by-hand'.*--no-resume"):
        CheckpointWriter(tmp_path / "out", "another")
    assert _bytes(tmp_path / "out") == before


def test_finish_when_resume_is_off_replaces_the_old_checkpoint(write: Callable[..., Path], tmp_path: Path) -> None:
    write()
    write(fingerprint="new", resume=False)
    assert open_checkpoint(tmp_path / "out").quantization.provenance["fingerprint"] == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_open_when_parent_is_missing_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="parent folder"), CheckpointWriter(tmp_path / "no" / "out", "f"):
        pass


@pytest.mark.parametrize(
    ("code", "match"),
    [
        (errno.ENOSPC, r"disk is full; .* bytes are needed"),
        (errno.EROFS, "may not be written"),
        (errno.EIO, "cannot be"),
    ],
)
def test_write_block_when_the_disk_refuses_keeps_what_is_done(
    code: int, match: str, write: Callable[..., Path], block: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write(tmp_path / "whole")
    real = os.fsync

    def refuse(_: int) -> None:
        raise OSError(code, os.strerror(code))

    with CheckpointWriter(tmp_path / "out", "f") as first:
        first.write_block(0, *block(0))
        monkeypatch.setattr(os, "fsync", refuse)
        with pytest.raises(CheckpointError, match=match):
            first.write_block(1, *block(1))
        assert first.done == 1
    monkeypatch.setattr(os, "fsync", real)
    assert not (tmp_path / "out").exists()
    assert _bytes(write(tmp_path / "out")) == _bytes(whole)


def test_finish_when_the_disk_fills_up_leaves_no_checkpoint(
    write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = write(tmp_path / "whole")
    monkeypatch.setattr(writer, "sync_folder", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(CheckpointError, match="disk is full"):
        write()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(writer, "sync_folder", files.sync_folder)
    assert _bytes(write()) == _bytes(whole)


def test_open_when_folder_is_read_only_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)  # a mode would not stop root
    with pytest.raises(CheckpointError, match="may not be written"), CheckpointWriter(tmp_path / "out", "f"):
        pass
    assert not list(tmp_path.iterdir())


def test_write_block_when_out_of_order_refuses(tmp_path: Path, block: Any) -> None:
    with CheckpointWriter(tmp_path / "out", "f") as run, pytest.raises(CheckpointError, match="block 0 was due"):
        run.write_block(1, *block(1))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c, t, f: c["quantization_config"]["layers"].pop("model.layers.1.mlp"), r"model\.layers\.1\.mlp"),
        (lambda c, t, f: c["quantization_config"]["provenance"].update(fingerprint="x"), "fingerprint 'x'"),
        (lambda c, t, f: c["quantization_config"]["figures"].update(loss=float("nan")), "finite JSON"),
        (lambda c, t, f: t.update({"model.layers.0.kept.weight": torch.ones(1)}), r"layers\.0\.kept\.weight.*two"),
        (lambda c, t, f: t.pop("model.mergequant_prefix.keys"), r"missing tensors model\.mergequant_prefix\.keys"),
        (lambda c, t, f: f.update({"../escape": b""}), "escape"),
        (lambda c, t, f: f.update({"config.json": b""}), "'config.json' cannot be"),
    ],
)
def test_finish_when_parts_disagree_publishes_nothing(
    change: Any, match: str, config: Any, tail: Any, block: Any, tmp_path: Path
) -> None:
    extra: dict[str, Any] = {}
    change(config, tail, extra)
    with CheckpointWriter(tmp_path / "out", "f") as run:
        for index in range(2):
            run.write_block(index, *block(index))
        with pytest.raises(CheckpointError, match=match):
            run.finish(tail=tail, config=config, files=extra)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "escape").exists()
