"""Writing files so that a crash leaves the old state or the new one, and faults of the disk are named."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergequant.errors import CheckpointError

__all__ = ["FolderLock", "disk_errors", "read_json", "sync_folder", "write_bytes", "write_json"]


@contextmanager
def disk_errors(path: Path, needs: int | None = None) -> Iterator[None]:
    """Turn the operating system's refusals into CheckpointError.

    Args:
        path: what is being written.
        needs: bytes that the write takes, if known.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            size = "" if needs is None else f"; {needs:,} bytes are needed"
            raise CheckpointError(
                f"{path}: the disk is full{size}, {_free(path):,} bytes are free; free space or choose another --out, "
                "then run the same command again: finished blocks are kept"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise CheckpointError(
                f"{path}: may not be written ({error.strerror}); change its permissions or choose another --out"
            ) from error
        raise CheckpointError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write under a temporary name, fsync, move into place."""
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path, len(data)):
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)


def write_json(path: Path, data: Any) -> None:
    """As `write_bytes`, with sorted keys, so that equal content gives equal bytes.

    Raises:
        CheckpointError: a value that JSON cannot hold (a NaN among the figures, a tensor).
    """
    try:
        text = json.dumps(data, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path.name}: {error}; figures and provenance must be finite JSON values") from error
    write_bytes(path, text.encode() + b"\n")


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        CheckpointError: the file is missing, unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing; fetch or write the checkpoint again") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as JSON ({error}); fetch or write the checkpoint again"
        ) from error


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class FolderLock:
    """An exclusive lock on a folder that the operating system frees when its process dies."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock"
        self._handle: int | None = None

    def acquire(self) -> None:
        """Create the folder and take the lock.

        Raises:
            CheckpointError: another process holds it, or the folder cannot be written.
        """
        while self._handle is None:
            with disk_errors(self.path.parent):
                self.path.parent.mkdir(exist_ok=True)
                handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(handle)
                raise CheckpointError(
                    f"{self.path.parent}: another process is writing it; wait for that one or choose another --out"
                ) from error
            # The last holder may have removed the file between our open and our lock: then we hold a ghost.
            if self.path.exists() and os.path.samestat(os.fstat(handle), self.path.stat()):
                self._handle = handle
            else:
                os.close(handle)

    def release(self) -> None:
        """Free the lock; nothing happens without one."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _free(path: Path) -> int:
    return shutil.disk_usage(next(folder for folder in (path, *path.parents) if folder.is_dir())).free
