"""Ours against vLLM's own schemes in vLLM's engine: one process after another, in turns, one JSON file.

    python benchmarks/vllm/run.py --shape llama-2-7b --out results.json
    python benchmarks/vllm/run.py --shape llama-2-70b-layer --tensor-parallel 2 --schemes bf16,ours-w4a8 --out tp2.json
    python benchmarks/vllm/run.py --gpus 2 --together 4 --out results.json

With --gpus each GPU measures a scheme of its own; with --together so many engines of a GPU start side by side, which
takes most of the time, and are then measured one after another while the others rest.

Needs vLLM, this package with its plugin in the same environment, and an NVIDIA GPU. `--render FILE` prints the table of
earlier results and needs neither.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial as partial_of
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

from schemes import SCHEMES, SHAPES, Ours, write_folder

HERE = Path(__file__).resolve().parent
Job = TypeVar("Job")
Result = TypeVar("Result")
LOOK = 0.1  # seconds between looks at what an engine has written
PROCESSES: set["subprocess.Popen[bytes]"] = set()  # engines that run now
# column: part of the figures, its key, whether less is better, what the numbers are divided by
COLUMNS: dict[str, tuple[str, str, bool, float]] = {
    "prefill 1 x 2048, GPU ms": ("prefill_1", "gpu_ms", True, 1),
    "prefill 16 x 2048, ktok/s": ("prefill_16", "tokens_per_second", False, 1e3),
    "first token, ms": ("prefill_1", "wall_ms", True, 1),
    "decode b1, GPU ms": ("decode_1", "gpu_ms", True, 1),
    "decode b16, GPU ms": ("decode_16", "gpu_ms", True, 1),
    "decode b64, GPU ms": ("decode_64", "gpu_ms", True, 1),
    "16 x (2048, 128), tok/s": ("end_to_end", "tokens_per_second", False, 1),
}


def main() -> None:
    """Measure, or render."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parser.add_argument("--schemes", default=",".join(SCHEMES), help="comma-separated")
    parser.add_argument("--layers", type=int, help="instead of the shape's own number")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--gpus", type=int, help="of this host; as many schemes run at a time as fit. Default: one")
    parser.add_argument("--together", type=int, default=1, help="engines on a GPU, if its memory holds them")
    parser.add_argument(
        "--path", action="append", default=[], metavar="SCHEME=FOLDER", help="in PYTHONPATH, for this scheme alone"
    )
    parser.add_argument(
        "--kv", default="auto", choices=("auto", "fp8"), help="vLLM's cache; schemes with one of ours keep it"
    )
    parser.add_argument("--rounds", type=int, default=1, help="each scheme is measured as often, in turns")
    parser.add_argument("--quick", action="store_true", help="no repetitions: to try the script")
    parser.add_argument("--minutes", type=float, default=9.0, help="for one scheme")
    parser.add_argument("--folders", type=Path, default=Path(tempfile.gettempdir()) / "mergequant-vllm")
    parser.add_argument("--out", type=Path, default=Path("vllm.json"))
    parser.add_argument("--render", type=Path)
    given = parser.parse_args()
    if given.render:
        print(table(json.loads(given.render.read_text(encoding="utf-8"))))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # engines are ended, too
    names = given.schemes.split(",")
    if unknown := [name for name in names if name not in SCHEMES]:
        parser.error(f"unknown schemes {', '.join(unknown)}; known are {', '.join(SCHEMES)}")
    try:
        places = gpu_groups(given.gpus or given.tensor_parallel, given.tensor_parallel)
    except ValueError as error:
        parser.error(str(error))
    results: dict[str, Any] = {
        "shape": given.shape,
        "layers": given.layers,
        "tensor_parallel": given.tensor_parallel,
        "at_a_time": len(places),
        "together": given.together,
        "kv": given.kv,
        "quick": given.quick,
        "gpu": gpus(),
        "versions": versions(),
        "command": " ".join(sys.argv),
        "runs": [],
    }
    folders = _folders(names, given)
    batches = [tuple(names[first : first + given.together]) for first in range(0, len(names), given.together)]
    writing = threading.Lock()

    def record(name: str, number: int, figures: dict[str, Any]) -> None:
        """Keep what a scheme gave at once: another one may take all the time that is left."""
        with writing:
            print(f"round {number + 1}: {name}, {figures.get('error') or figures['seconds']}", flush=True)
            results["runs"].append({"scheme": name, "round": number, **figures})
            results["runs"].sort(key=lambda run: (run["round"], names.index(run["scheme"])))
            partial = given.out.with_name(given.out.name + ".tmp")
            partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            partial.replace(given.out)

    for number in range(given.rounds):
        run = partial_of(_run, folders=folders, given=given, keep=partial_of(record, number=number))
        for _ in side_by_side(batches, places, run):
            pass
        places = places[1:] + places[:1]  # a scheme meets another GPU in each round
    print(table(results))


def gpu_groups(gpus: int, each: int) -> list[str]:
    """Values of CUDA_VISIBLE_DEVICES: disjoint groups of `each` of the first GPUs that this process may use.

    Raises:
        ValueError: fewer GPUs than a scheme needs, or than this process may use.
    """
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = [str(number) for number in range(gpus)] if allowed is None else allowed.split(",")
    if not each <= gpus <= len(known):
        raise ValueError(f"--gpus {gpus}: a scheme needs {each}, and CUDA_VISIBLE_DEVICES is {allowed}")
    return [",".join(known[first : first + each]) for first in range(0, gpus - each + 1, each)]


def side_by_side(
    jobs: Sequence[Job], places: Sequence[str], run: Callable[[Job, str], Result]
) -> Iterator[tuple[Job, Result]]:
    """run(job, place) for each job, in their order, as many at a time as there are places, each on one of its own.

    Yields jobs with results, as they are done.
    """
    free: SimpleQueue[str] = SimpleQueue()
    for place in places:
        free.put(place)

    def take(job: Job) -> Result:
        place = free.get()
        try:
            return run(job, place)
        finally:
            free.put(place)

    with ThreadPoolExecutor(len(places)) as pool:
        waiting = {pool.submit(take, job): job for job in jobs}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(PROCESSES):
                _end(process)
            raise


def _folders(names: Sequence[str], given: argparse.Namespace) -> dict[str, Path]:
    """All folders, before anything is measured; by processes of their own, which leave nothing on the GPU."""
    source = (
        "import json, sys; from pathlib import Path; from schemes import write_folder; "
        "shape, name, root, layers = json.loads(sys.argv[1]); write_folder(shape, name, Path(root), layers, 'cuda')"
    )

    def write(name: str) -> None:
        asked = json.dumps([given.shape, name, str(given.folders.resolve()), given.layers])
        subprocess.run([sys.executable, "-c", source, asked], cwd=HERE, check=True)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, [name for name in names if isinstance(SCHEMES[name], Ours)]))
    return {name: write_folder(given.shape, name, given.folders, given.layers) for name in names}


def _run(
    names: Sequence[str],
    gpus: str,
    folders: dict[str, Path],
    given: argparse.Namespace,
    keep: Callable[..., None],
) -> None:
    """keep(name, figures=) of schemes on the same GPUs: their engines start together and are measured in turn."""
    engines = [Engine(name, folders[name], gpus, given) for name in names]
    try:
        for engine in engines:
            engine.wait_for(engine.ready)
        for name, engine in zip(names, engines):
            keep(name, figures=engine.measure())
    finally:
        for engine in engines:
            engine.end()


class Engine:
    """A scheme's engine in a process of its own: it says when it is ready, waits for its turn, and is ended in time."""

    def __init__(self, name: str, folder: Path, gpus: str, given: argparse.Namespace) -> None:
        kind = SCHEMES[name]
        own_cache = isinstance(kind, Ours) and kind.kv < 16
        settings = {
            "arguments": kind.arguments,
            "quick": given.quick,
            "tensor_parallel": given.tensor_parallel,
            "together": given.together,
            "kv": "auto" if own_cache else given.kv,
        }
        self.gpus, self.limit, self.started = gpus, 60 * given.minutes, time.time()
        self.out, self.log = given.folders / f"{name}.json", given.folders / f"{name}.log"
        self.ready, self.turn = self.out.with_suffix(".ready"), self.out.with_suffix(".turn")
        for old in (self.out, self.ready, self.turn):
            old.unlink(missing_ok=True)
        command = [sys.executable, str(HERE / "engine.py"), str(folder), str(self.out), json.dumps(settings)]
        paths = [path for scheme, _, path in (each.partition("=") for each in given.path) if scheme == name]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        own = {**os.environ, "CUDA_VISIBLE_DEVICES": gpus, "PYTHONPATH": os.pathsep.join(paths)}
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=own, start_new_session=True
            )
        PROCESSES.add(self.process)

    def wait_for(self, path: Path) -> None:
        """Until the file is there, the process has ended, or its time is over."""
        end = time.monotonic() + self.limit
        while not path.is_file() and self.process.poll() is None and time.monotonic() < end:
            time.sleep(LOOK)

    def measure(self) -> dict[str, Any]:
        """Let it measure; its figures, or what went wrong."""
        self.turn.touch()
        self.wait_for(self.out)
        self.end()
        taken = {"gpus": self.gpus, "seconds": round(time.time() - self.started, 1)}
        if not self.out.is_file():
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
            return {"error": "no result; the log ends: " + " | ".join(lines[-5:])[-1000:], **taken}
        return {**json.loads(self.out.read_text(encoding="utf-8")), **taken}

    def end(self) -> None:
        """End it with its workers."""
        _end(self.process)
        PROCESSES.discard(self.process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the process with its workers, which are its own group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def gpus() -> str:
    """Number, name and driver of the GPUs, without taking memory on one."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    lines = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.splitlines()
    name, driver = lines[0].split(", ")
    return f"{len(lines)} x {name}, driver {driver}"


def versions() -> dict[str, str]:
    """Of what takes part."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("vllm", "torch", "triton", "mergequant", "compressed-tensors", "humming-kernels"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def summarise(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each scheme: mean over rounds of each column, the spread, the kernels, and what is wrong.

    A scheme that another kernel served than the one that its name says is no rival: its fault names both.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(run["scheme"] for run in results["runs"]):
        runs = [run for run in results["runs"] if run["scheme"] == name]
        faults = [run["error"] for run in runs if "error" in run]
        kernels = sorted({kernel for run in runs for worker in run.get("workers", ()) for kernel in worker["kernels"]})
        wanted = SCHEMES[name].kernel
        if not faults and wanted and not any(wanted.lower() in kernel.lower() for kernel in kernels):
            faults.append(f"served by {', '.join(kernels) or 'nothing known'}, not by {wanted}")
        row: dict[str, Any] = {"kernels": kernels, "fault": "; ".join(faults), "values": {}, "spread": {}}
        for column, (part, key, _, unit) in COLUMNS.items():
            values = [run[part][key] / unit for run in runs if run.get(part, {}).get(key)]
            if values:
                row["values"][column] = sum(values) / len(values)
                row["spread"][column] = (max(values) - min(values)) / row["values"][column]
        weights = [sum(worker["weight_gib"] for worker in run["workers"]) for run in runs if "workers" in run]
        if weights:
            row["values"]["weights GiB"] = weights[0]
        found[name] = row
    return found


def ratios(summary: dict[str, dict[str, Any]]) -> dict[str, dict[str, tuple[float, str]]]:
    """For each scheme of ours and column: how much better than the best sound rival (above 1 = better), and which."""
    out: dict[str, dict[str, tuple[float, str]]] = {}
    rivals = {n: row for n, row in summary.items() if not isinstance(SCHEMES[n], Ours) and not row["fault"]}
    for name, row in summary.items():
        if not isinstance(SCHEMES[name], Ours):
            continue
        out[name] = {}
        for column, (_, _, less, _) in COLUMNS.items():
            others = {rival: own["values"][column] for rival, own in rivals.items() if column in own["values"]}
            if column in row["values"] and others:
                best = min(others, key=others.__getitem__) if less else max(others, key=others.__getitem__)
                mine = row["values"][column]
                out[name][column] = (others[best] / mine if less else mine / others[best], best)
    return out


def table(results: dict[str, Any]) -> str:
    """Markdown: figures, ratios to the best rival, and what went wrong."""
    summary = summarise(results)
    columns = ["weights GiB", *COLUMNS]
    lines = [
        f"{results['shape']}, tensor parallel {results['tensor_parallel']}, cache {results['kv']}, "
        f"vLLM {results['versions'].get('vllm')}",
        "",
        "| scheme | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, row in summary.items():
        cells = [f"{row['values'][column]:.4g}" if column in row["values"] else "-" for column in columns]
        lines.append(f"| {name}{' (!)' if row['fault'] else ''} | " + " | ".join(cells) + " |")
    for name, own in ratios(summary).items():
        told = ", ".join(f"{column} {ratio:.2f}x of {best}" for column, (ratio, best) in own.items())
        lines.append(f"\n{name} against the best rival: {told or 'nothing to compare with'}")
    lines += [f"\n(!) {name}: {row['fault']}" for name, row in summary.items() if row["fault"]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
