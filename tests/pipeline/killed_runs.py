"""Run by `test_resume.py` in a process of its own: starts runs of the pipeline and kills each at one place.

    python killed_runs.py JOBS.json

A job is {"model", "data", "recipe", "settings", "out", "place", "call"}: `place` is the dotted name of what the run is
to be killed at, when it is called for the `call`-th time, before it does anything. Prints the signal that ended each.
"""

import importlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import mergequant


def kill_at(place: str, call: int) -> None:
    module, _, name = place.rpartition(".")
    try:
        owner: Any = importlib.import_module(module)
    except ModuleNotFoundError:
        module, _, kind = module.rpartition(".")
        owner = getattr(importlib.import_module(module), kind)
    real, count = getattr(owner, name), [0]

    def deadly(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, deadly)


def run(job: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    kill_at(job["place"], job["call"])
    data = torch.tensor(job["data"])
    mergequant.quantize(
        job["model"],
        job["recipe"],
        settings=job["settings"],
        data=data,
        out=job["out"],
        samples=job["samples"],
        seqlen=data.shape[1],
    )


def main() -> None:
    ends = []
    for job in json.loads(Path(sys.argv[1]).read_text()):
        child = os.fork()
        if child == 0:
            try:
                run(job)
            finally:
                os._exit(1)  # the run was to be killed
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps(ends))


if __name__ == "__main__":
    main()
