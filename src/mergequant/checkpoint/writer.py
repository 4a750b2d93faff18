"""CheckpointWriter: a checkpoint grows block by block beside its target and appears there whole, or not at all."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors.torch import load_file
from torch import Tensor

from mergequant.checkpoint.files import FolderLock, disk_errors, read_json, sync_folder, write_bytes, write_json
from mergequant.checkpoint.format import (
    CONFIG_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    QUANT_METHOD,
    SINGLE_NAME,
    Quantization,
)
from mergequant.checkpoint.reader import open_checkpoint
from mergequant.checkpoint.tensorfile import Entry, read_header, write_tensors
from mergequant.errors import CheckpointError, UsageError

__all__ = ["CheckpointWriter", "check_place"]

LARGEST_SHARD = 2 << 30  # bytes; a block that is larger has a shard of its own
PROGRESS_NAME = "progress.json"
LEARNED_NAME = "learned.safetensors"
OURS = re.compile(r"(lock|progress\.json|learned\.safetensors|block-\d{5}\.(safetensors|json))(\.tmp)?")
FINAL, REPLACED = "final", "replaced"  # folders inside the partial one


class CheckpointWriter:
    """Writes `<out>.partial/` block by block, then moves the finished folder to `out`. A context manager.

    A block counts as done when its record exists and agrees with the size and sha256 of its tensors; a run with the
    same fingerprint goes on after the leading done blocks. The partial folder is locked while it is open.

    Args:
        out: folder of the finished checkpoint; must not exist, or be empty, or hold a checkpoint of ours.
        fingerprint: says what is being made (model, recipe, data, code version).
        resume: go on with what is there; else start anew and replace a checkpoint of ours.

    Raises:
        UsageError: `out` holds something that is not ours, or another checkpoint than this one.
        CheckpointError: the folder beside `out` cannot be written, is in use, or holds files that are not ours.
    """

    def __init__(self, out: Path, fingerprint: str, *, resume: bool = True) -> None:
        self.out = Path(os.path.abspath(out))
        self.partial = self.out.with_name(self.out.name + ".partial")
        self.fingerprint = fingerprint
        self.resume = resume
        self.finished = self._check_target()
        self._lock = FolderLock(self.partial)
        self._done = 0

    @property
    def done(self) -> int:
        """Number of leading blocks that are written."""
        return self._done

    def __enter__(self) -> Self:
        if self.finished and not self.partial.is_dir():
            return self
        self._lock.acquire()
        try:
            if self.finished:  # the last run was interrupted while it tidied up
                self._empty_partial(keep_lock=False)
            else:
                self._open_partial()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        nothing = not self._done and not (self.partial / LEARNED_NAME).exists()
        if not self.finished and nothing and not self._foreign_files():
            self._empty_partial(keep_lock=False)
        self._lock.release()

    def write_block(self, index: int, tensors: Mapping[str, Tensor], record: dict[str, Any]) -> None:
        """Store block `index` (the next one: blocks come in order).

        Args:
            index: number of the block, from 0.
            tensors: by full name.
            record: JSON-ready; `record["layers"]` holds the description of each quantized module by its full name.

        Raises:
            CheckpointError: a block out of order, or a disk that refuses.
        """
        if self.finished or index != self._done:
            raise CheckpointError(f"{self.out}: block {index} was written when block {self._done} was due")
        path, note = self._block(index)
        temporary = path.with_name(path.name + ".tmp")
        with disk_errors(path, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())):
            size, digest = write_tensors(temporary, tensors)
            os.replace(temporary, path)
        write_json(note, {"size": size, "sha256": digest, "record": record})
        with disk_errors(self.partial):
            sync_folder(self.partial)
        self._done += 1

    def write_learned(self, tensors: Mapping[str, Tensor]) -> None:
        """Store what was learned about the whole model before its first block; it is no part of the checkpoint.

        Raises:
            CheckpointError: a disk that refuses.
        """
        path = self.partial / LEARNED_NAME
        temporary = path.with_name(path.name + ".tmp")
        with disk_errors(path, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())):
            write_tensors(temporary, tensors)
            os.replace(temporary, path)
            sync_folder(self.partial)

    def learned(self) -> dict[str, Tensor] | None:
        """What `write_learned` stored in this run or the one that it goes on with; None if nothing."""
        path = self.partial / LEARNED_NAME
        return load_file(path) if path.is_file() else None

    def block_tensors(self, index: int) -> dict[str, Tensor]:
        """Tensors of a block that is done, on the CPU."""
        return load_file(self._written(index)[0])

    def block_record(self, index: int) -> dict[str, Any]:
        """Record of a block that is done, as it was given to `write_block`."""
        return read_json(self._written(index)[1])["record"]

    def finish(
        self,
        *,
        tail: Mapping[str, Tensor],
        config: dict[str, Any],
        files: Mapping[str, bytes | str | Path],
        verify: Callable[[Path], None] | None = None,
    ) -> Path:
        """Join blocks and tail into shards, write the config last, check all of it, and move the folder to `out`.

        Args:
            tail: tensors outside the blocks (embeddings, final norm, head, prefix), by full name.
            config: the whole config.json with `quantization_config`; the fingerprint is added to its provenance.
            files: further files by plain name: their content, or the path of a file to copy.
            verify: called with the folder while it is still a part of `<out>.partial/`; what it raises keeps the
                checkpoint from appearing at `out`.

        Returns:
            `out`.

        Raises:
            CheckpointError: the config does not describe what the blocks hold, or the disk refuses.
        """
        config = self._checked_config(config)
        final = self.partial / FINAL
        blocks = [read_header(self._block(index)[0]).entries for index in range(self._done)]
        with disk_errors(self.out, sum(entry.size for block in blocks for entry in block.values())):
            shutil.rmtree(final, ignore_errors=True)
            final.mkdir()
            self._write_shards(final, [*blocks, dict(tail)])
            for name, content in files.items():
                if Path(name).name != name or name in (CONFIG_NAME, INDEX_NAME) or name.endswith(".safetensors"):
                    raise CheckpointError(
                        f"{name!r} cannot be a file of the checkpoint; pass plain names of other files"
                    )
                data = content.read_bytes() if isinstance(content, Path) else content
                write_bytes(final / name, data.encode() if isinstance(data, str) else data)
            write_json(final / CONFIG_NAME, config)
            sync_folder(final)
            open_checkpoint(final).validate()
        if verify is not None:
            verify(final)
        with disk_errors(self.out):
            self._publish(final)
        self.finished = True
        self._empty_partial(keep_lock=False)
        return self.out

    def _check_target(self) -> bool:
        """Whether `out` already holds this very checkpoint."""
        held = check_place(self.out)
        if held is None or not self.resume:
            return False
        if held.provenance.get("fingerprint") == self.fingerprint:
            return True
        raise UsageError(
            f"{self.out} holds a checkpoint of recipe {held.recipe.get('name', 'unknown')!r} made from another model, "
            "recipe, data or release; remove it, choose another --out, or replace it with --no-resume"
        )

    def _open_partial(self) -> None:
        progress = self.partial / PROGRESS_NAME
        wanted = {"fingerprint": self.fingerprint, "format_version": FORMAT_VERSION}
        if not self.resume or not progress.exists() or _lenient_json(progress) != wanted:
            self._empty_partial(keep_lock=True)
            write_json(progress, wanted)
        while self._is_done(self._done):
            self._done += 1

    def _empty_partial(self, *, keep_lock: bool) -> None:
        if foreign := self._foreign_files():
            raise CheckpointError(f"{foreign[0]} is not a file of mergequant's; move it away or choose another --out")
        with disk_errors(self.partial):
            for folder in (FINAL, REPLACED):
                shutil.rmtree(self.partial / folder, ignore_errors=True)
            for path in self.partial.iterdir():
                if path != self._lock.path:
                    path.unlink()
            if not keep_lock:
                self._lock.path.unlink()
                self.partial.rmdir()

    def _foreign_files(self) -> list[Path]:
        return [p for p in self.partial.iterdir() if p.name not in (FINAL, REPLACED) and not OURS.fullmatch(p.name)]

    def _is_done(self, index: int) -> bool:
        path, note = self._block(index)
        known = _lenient_json(note)
        if not isinstance(known, dict) or not path.is_file() or path.stat().st_size != known.get("size"):
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == known.get("sha256")

    def _written(self, index: int) -> tuple[Path, Path]:
        if not 0 <= index < self._done:
            raise CheckpointError(f"{self.partial}: block {index} is not written yet; {self._done} blocks are")
        return self._block(index)

    def _block(self, index: int) -> tuple[Path, Path]:
        return self.partial / f"block-{index:05d}.safetensors", self.partial / f"block-{index:05d}.json"

    def _checked_config(self, config: dict[str, Any]) -> dict[str, Any]:
        parsed = Quantization.from_dict(config.get("quantization_config"))
        for index in range(self._done):
            for name, spec in self.block_record(index).get("layers", {}).items():
                if name not in parsed.layers or parsed.layers[name].to_dict() != spec:
                    raise CheckpointError(f"{name}: block {index} holds this layer, the config describes it otherwise")
        known = parsed.provenance.get("fingerprint", self.fingerprint)
        if known != self.fingerprint:
            raise CheckpointError(f"the config's fingerprint {known!r} is not this writer's {self.fingerprint!r}")
        parsed = replace(parsed, provenance={**parsed.provenance, "fingerprint": known})
        return {**config, "quantization_config": parsed.to_dict()}

    def _write_shards(self, folder: Path, units: list[dict[str, Any]]) -> None:
        shards: list[list[int]] = []
        room = 0
        for number, unit in enumerate(units):
            size = sum(_size(tensor) for tensor in unit.values())
            if not shards or size > room:
                shards.append([])
                room = LARGEST_SHARD
            shards[-1].append(number)
            room -= size
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
        if len(shards) == 1:
            names = [SINGLE_NAME]
        places: dict[str, str] = {}
        for name, numbers in zip(names, shards):
            joined: dict[str, Tensor | Entry] = {}
            for number in numbers:
                if twice := sorted(set(units[number]) & (set(joined) | set(places))):
                    raise CheckpointError(f"tensor {twice[0]!r} is in two blocks, or in a block and in the tail")
                joined.update(units[number])
            places.update(dict.fromkeys(joined, name))
            if numbers == [len(units) - 1] or len(numbers) > 1:
                write_tensors(folder / name, joined)
            else:
                _link(self._block(numbers[0])[0], folder / name)
        if len(shards) > 1:
            total = sum(_size(tensor) for unit in units for tensor in unit.values())
            write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": places})

    def _publish(self, final: Path) -> None:
        if self.out.is_dir() and any(self.out.iterdir()):
            shutil.rmtree(self.partial / REPLACED, ignore_errors=True)
            os.rename(self.out, self.partial / REPLACED)
        os.rename(final, self.out)
        sync_folder(self.out.parent)


def check_place(out: Path) -> Quantization | None:
    """What `out` holds: None if it is free; a checkpoint of ours counts, even a newer or a damaged one, of no recipe.

    Raises:
        UsageError: `out` holds something that is not ours.
        CheckpointError: its parent folder does not exist.
    """
    if not out.absolute().parent.is_dir():
        raise CheckpointError(f"{out}: its parent folder does not exist; create it or choose another --out")
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return None
    config = _lenient_json(out / CONFIG_NAME)
    held = config.get("quantization_config") if isinstance(config, dict) else None
    if not isinstance(held, dict) or held.get("quant_method") != QUANT_METHOD:
        raise UsageError(f"{out} exists and is no mergequant checkpoint; it is left alone, choose another --out")
    recipe, provenance = held.get("recipe"), held.get("provenance")
    return Quantization(
        recipe if isinstance(recipe, dict) else {}, {}, provenance if isinstance(provenance, dict) else {}, {}
    )


def _size(tensor: Tensor | Entry) -> int:
    return tensor.size if isinstance(tensor, Entry) else tensor.numel() * tensor.element_size()


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)  # costs no space, and the block stays for a run that is interrupted here
    except OSError:
        shutil.copyfile(source, target)
        with target.open("rb") as file:
            os.fsync(file.fileno())


def _lenient_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
