"""Compiled kernels on disk, so that each machine compiles each source once.

One file per fingerprint and driver: a sha256 of the machine code, then the machine code. Files are written under a
temporary name and moved; a damaged one is compiled again. While a process compiles, it holds a lock on a file beside
it, which the system frees when the process dies, however it dies.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["folder", "locked", "read", "write"]

DIGEST_BYTES = 32
LOG = logging.getLogger("mergequant")


def folder() -> Path:
    """`$MERGEQUANT_CACHE`, else `mergequant/kernels` in the user's cache folder."""
    chosen = os.environ.get("MERGEQUANT_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "mergequant" / "kernels"


def read(key: str) -> bytes | None:
    """Machine code stored under a key; None if there is none, or it is damaged."""
    try:
        data = (folder() / f"{key}.cubin").read_bytes()
    except OSError:
        return None
    digest, cubin = data[:DIGEST_BYTES], data[DIGEST_BYTES:]
    return cubin if hashlib.sha256(cubin).digest() == digest else None


def write(key: str, cubin: bytes) -> None:
    """Store machine code. A folder that cannot be written costs the next process a compilation, and is reported."""
    try:
        place = folder()
        place.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=place, prefix=f"{key}.")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(hashlib.sha256(cubin).digest() + cubin)
            os.replace(name, place / f"{key}.cubin")
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
    except OSError as error:
        LOG.warning(
            "compiled kernels cannot be kept in %s (%s); set MERGEQUANT_CACHE to a writable folder", folder(), error
        )


@contextlib.contextmanager
def locked(key: str) -> Iterator[None]:
    """Hold the lock of a key, so that two processes do not compile the same kernel; without a writable folder, none."""
    try:
        place = folder()
        place.mkdir(parents=True, exist_ok=True)
        stream = open(place / f"{key}.lock", "w")  # noqa: SIM115 - closed below, with the lock
    except OSError:
        yield
        return
    try:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(stream.name)
        stream.close()
