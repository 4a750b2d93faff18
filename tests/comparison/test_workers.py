"""Processes that work off groups: order inside a group, errors, deaths, and the end of all with their parent."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mergequant.comparison.workers import work_off
from mergequant.errors import DataError

PARENT = """
import os, sys, time
from pathlib import Path
from mergequant.comparison.workers import work_off

def sleep(path):
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)

if __name__ == "__main__":
    list(work_off([[sys.argv[1]], [sys.argv[2]]], 2, sleep, None))
"""


def do(job: tuple[str, int]) -> tuple[str, int, int]:
    """A job by its first word."""
    what, number = job
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "leave":
        os._exit(3)
    if what == "raise":
        raise DataError(f"no text {number}")
    if what == "card":
        return (os.environ["CARD"], number, os.getpid())
    if what == "odd":
        raise _OddError(1, 2)
    return (what, number, os.getpid())


class _OddError(Exception):
    """One that cannot be pickled."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(str(first + second))


def gone(job: tuple[str, int], how: str) -> tuple[str, int, int]:
    """Record of a lost job."""
    return (how, job[1], 0)


@pytest.mark.slow
def test_groups_stay_in_one_process_and_deaths_cost_one_job() -> None:
    groups = [[("a", 0), ("a", 1)], [("die", 2), ("b", 3)], [], [("c", 4)], [("leave", 5)]]
    records = list(work_off(groups, 2, do, gone))
    assert sorted(record[1] for record in records) == [0, 1, 2, 3, 4, 5]
    by_number = {record[1]: record for record in records}
    assert by_number[0][2] == by_number[1][2] != os.getpid()
    assert by_number[2][0] == "was ended by SIGKILL"
    assert by_number[3][0] == "b"
    assert by_number[5][0] == "ended with status 3"


@pytest.mark.slow
@pytest.mark.parametrize(("what", "error", "words"), [("raise", DataError, "no text 7"), ("odd", RuntimeError, "3")])
def test_what_a_job_raises_is_raised_here(what: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        list(work_off([[(what, 7)], [("a", 1)]], 2, do, gone))


@pytest.mark.slow
def test_processes_take_environments_in_turn() -> None:
    groups = [[("card", number)] for number in range(6)]
    records = list(work_off(groups, 3, do, gone, [{"CARD": "a"}, {"CARD": "b"}]))
    cards = {pid: card for card, _, pid in records}
    assert sorted(cards.values()) == ["a", "a", "b"]
    assert "CARD" not in os.environ


@pytest.mark.slow
def test_killed_parent_takes_its_processes_along(tmp_path: Path) -> None:
    script, marks = tmp_path / "parent.py", [tmp_path / "first", tmp_path / "second"]
    script.write_text(PARENT, encoding="utf-8")
    parent = subprocess.Popen([sys.executable, script, *marks])
    try:
        _until(lambda: all(mark.exists() and mark.read_text() for mark in marks))
    finally:
        parent.kill()
        parent.wait()
    _until(lambda: not any(_runs(int(mark.read_text())) for mark in marks))


def _until(met: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not met():
        assert time.monotonic() < end
        time.sleep(0.1)


def _runs(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
