"""The cache of compiled kernels: whole files only, damaged ones ignored, locks that die with their process."""

import logging
import os
import signal
import subprocess
import sys
import time

import pytest

from mergequant.ops.cuda import disk_cache

HOLD = """
import sys, time
from mergequant.ops.cuda import disk_cache
with disk_cache.locked("key"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MERGEQUANT_CACHE", str(tmp_path / "kernels"))


def test_read_when_written_expect_the_same_bytes() -> None:
    assert disk_cache.read("key") is None
    disk_cache.write("key", b"machine code")
    assert disk_cache.read("key") == b"machine code"
    assert disk_cache.read("other") is None
    assert [path.name for path in disk_cache.folder().iterdir()] == ["key.cubin"]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"!", lambda _: b""])
def test_read_when_the_file_is_damaged_expect_none(damage) -> None:
    disk_cache.write("key", b"machine code")
    path = disk_cache.folder() / "key.cubin"
    path.write_bytes(damage(path.read_bytes()))
    assert disk_cache.read("key") is None


def test_write_when_the_folder_cannot_be_made_expect_a_warning_that_names_the_variable(
    tmp_path, monkeypatch, caplog
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MERGEQUANT_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING, logger="mergequant"):
        disk_cache.write("key", b"machine code")
    assert "MERGEQUANT_CACHE" in caplog.text
    with disk_cache.locked("key"):
        assert disk_cache.read("key") is None


def test_lock_when_its_holder_is_killed_expect_it_to_be_free(tmp_path) -> None:
    environment = {**os.environ, "MERGEQUANT_CACHE": str(disk_cache.folder())}
    holder = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, env=environment)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    started = time.monotonic()
    with disk_cache.locked("key"):
        assert time.monotonic() - started < 30


def test_folder_when_no_variable_is_set_expect_the_users_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("MERGEQUANT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert disk_cache.folder() == tmp_path / "mergequant" / "kernels"
