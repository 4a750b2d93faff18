"""Processes that work off groups of jobs: one that dies costs the job that it was at, and nothing waits for it."""

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Generic, TypeVar

import torch
import transformers

__all__ = ["work_off"]

Job = TypeVar("Job")
Record = TypeVar("Record")
GRACE = 5.0  # seconds for a process to end by itself


@dataclass
class _Worker(Generic[Job]):
    """A process, our end of its pipe, and the jobs of its group that have not come back."""

    process: BaseProcess
    pipe: Connection
    left: deque[Job] = field(default_factory=deque)


def work_off(
    groups: Sequence[Sequence[Job]],
    workers: int,
    run: Callable[[Job], Record],
    lost: Callable[[Job, str], Record],
    environments: Sequence[Mapping[str, str]] = (),
) -> Iterator[Record]:
    """Records of all jobs as they come; the jobs of a group run one after another, in one process.

    Processes are started anew, since forked ones cannot use a GPU, and share the CPU's cores. They end with this one,
    however it ends.

    Args:
        groups: jobs; like `run`, something that can be pickled.
        workers: how many processes at most.
        run: makes a record of a job.
        lost: makes the record of a job whose process died, from the job and how it died. The rest of its group goes on.
        environments: variables set in a process before it meets a job; the processes take them in turn.

    Raises:
        Exception: what `run` raised, after all processes were ended.
    """
    context = multiprocessing.get_context("spawn")
    threads = max((os.cpu_count() or 1) // workers, 1)
    turns = cycle(environments or ({},))
    waiting = deque(deque(group) for group in groups if group)
    idle: list[_Worker[Job]] = []
    busy: dict[Connection, _Worker[Job]] = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < workers:
                worker = idle.pop() if idle else _start(context, run, threads, next(turns))
                worker.left = waiting.popleft()
                busy[worker.pipe] = worker
                _send(worker)
            for pipe in wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                try:
                    worked, record = worker.pipe.recv()
                except (EOFError, OSError):
                    del busy[worker.pipe]
                    yield lost(worker.left.popleft(), _end(worker))
                    if worker.left:
                        waiting.appendleft(worker.left)
                    continue
                if not worked:
                    raise record
                worker.left.popleft()
                if worker.left:
                    _send(worker)
                else:
                    idle.append(busy.pop(worker.pipe))
                yield record
    finally:
        for worker in [*idle, *busy.values()]:
            worker.process.terminate()
        for worker in [*idle, *busy.values()]:
            _end(worker)


def _start(
    context: multiprocessing.context.SpawnContext,
    run: Callable[[Job], Record],
    threads: int,
    environment: Mapping[str, str],
) -> _Worker[Job]:
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, run, threads, dict(environment)), daemon=True)
    process.start()
    theirs.close()  # else its end would never be seen
    return _Worker(process, ours)


def _send(worker: _Worker[Job]) -> None:
    with suppress(OSError):  # it has died, which `recv` will say
        worker.pipe.send(worker.left[0])


def _end(worker: _Worker[Job]) -> str:
    """Wait for a process that has been told to end, or died; how it ended, in words."""
    worker.process.join(GRACE)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()
    worker.pipe.close()
    code = worker.process.exitcode or 0
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"


def _serve(pipe: Connection, run: Callable[[Job], Record], threads: int, environment: Mapping[str, str]) -> None:
    """What a process does: one job after another, until the other end is closed."""
    os.environ.update(environment)  # CUDA reads its own when it starts, which is at the first job
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends its processes
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()  # lines of many processes would mix
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, run(job)))
        except Exception as error:
            pipe.send((False, _portable(error)))


def _end_with_parent() -> None:
    """A parent that was killed cannot end its processes, and two runs in one folder would write the same files."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
