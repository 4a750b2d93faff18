"""`mergequant serve` with vLLM's HTTP server: health, completions, many clients, one that goes away, the end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import mergequant
from mergequant.assets import TINY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: pip install 'mergequant[vllm]'"),
    pytest.mark.skipif(find_spec("uvicorn") is None, reason="needs vLLM's HTTP server"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU with CUDA"),
]
START_SECONDS = 240
END_SECONDS = 60
OPTIONS = ("--max-model-len", "512", "--gpu-memory-utilization", "0.3", "--max-num-seqs", "64")
PROMPT = "Once upon a time, there was a little"


class Server:
    """A server of a checkpoint in a process group of its own."""

    def __init__(self, folder: Path, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.name, self.log = str(folder), log
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "mergequant", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*command, *OPTIONS], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self) -> None:
        """Until it says that it is ready."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self.process.poll() is None, f"the server ended: {self.told()}"
            with suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            time.sleep(0.5)
        raise TimeoutError(f"no server after {START_SECONDS} s: {self.told()}")

    def told(self) -> str:
        """The end of the log, and before it what processes of the engine say of errors."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join([*[line for line in lines if "ERROR" in line][:60], "...", *lines[-20:]])

    def request(self, **given: Any) -> urllib.request.Request:
        body = json.dumps({"model": self.name, "temperature": 0, **given}).encode()
        return urllib.request.Request(f"{self.url}/v1/completions", body, {"Content-Type": "application/json"})

    def complete(self, **given: Any) -> dict[str, Any]:
        with urllib.request.urlopen(self.request(**given), timeout=120) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def running(self) -> float:
        """Requests that are worked on."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=20) as answer:
            lines = answer.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running"))

    def end(self, number: int = signal.SIGINT) -> int:
        """Its exit status; killed if it does not end."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)
        try:
            return self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    mergequant.quantize(TINY, "mergequant-w4a8", out=folder / "model", samples=8, seqlen=64, device="cuda")
    one = Server(folder / "model", folder / "log")
    try:
        one.wait()
        yield one
    finally:
        with suppress(subprocess.TimeoutExpired):
            one.end()


def test_report_comes_before_the_server(server: Server) -> None:
    text = server.log.read_text()
    for part in ("checkpoint: ", "GPU: ", "kernel tiled_linear: cuda", "ask it: curl "):
        assert part in text
    assert text.index("ask it: curl ") < text.index("Application startup complete")


def test_an_answer_is_the_model_s_own(server: Server) -> None:
    found = server.complete(prompt=PROMPT, max_tokens=24, ignore_eos=True)
    choice = found["choices"][0]
    ids = AutoTokenizer.from_pretrained(server.name)(PROMPT, return_tensors="pt").input_ids
    assert found["usage"]["prompt_tokens"] == ids.shape[1]  # BOS included: the stored first token stands for it
    assert choice["finish_reason"] == "length"
    with torch.no_grad():
        model = mergequant.load(server.name, device="cuda", serve=False)
        own = model.generate(ids.cuda(), max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    wanted = AutoTokenizer.from_pretrained(server.name).decode(own)
    assert choice["text"].strip()[:20] == wanted.strip()[:20]  # a tie may part them further on


def test_two_hundred_clients_get_what_they_asked_for(server: Server) -> None:
    lengths = [1 + 7 * number % 61 for number in range(200)]

    def one(number: int) -> int:
        prompt = [1, *range(10, 12 + number % 90)]
        answer = server.complete(prompt=prompt, max_tokens=lengths[number], ignore_eos=True)
        return int(answer["usage"]["completion_tokens"])

    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(one, range(200))) == lengths


def test_a_client_that_goes_away_frees_its_place(server: Server) -> None:
    request = server.request(prompt=[1, 20], max_tokens=480, ignore_eos=True, stream=True)
    answer = urllib.request.urlopen(request, timeout=60)
    assert answer.readline().startswith(b"data: ")
    answer.close()
    end = time.monotonic() + 30
    while server.running():
        assert time.monotonic() < end
        time.sleep(0.1)
    assert server.complete(prompt=[1, 20], max_tokens=4, ignore_eos=True)["usage"]["completion_tokens"] == 4


def test_a_damaged_checkpoint_never_becomes_ready(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in Path(server.name).iterdir():
        content = file.read_bytes()
        (folder / file.name).write_bytes(content[:-64] if file.suffix == ".safetensors" else content)
    broken = Server(folder, tmp_path / "log")
    assert broken.process.wait(START_SECONDS) != 0
    assert "Application startup complete" not in broken.log.read_text()


def test_ctrl_c_ends_it(server: Server) -> None:
    server.end()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{server.url}/health", timeout=5)
