import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mergequant.cli.serve import memory_report

LLAMA_7B = {"num_key_value_heads": 32, "hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32}
GIB = 1 << 30


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A machine with vLLM and one GPU; what was started."""
    started: list[list[str]] = []
    module = sys.modules[memory_report.__module__]  # the command hides the module of its name
    monkeypatch.setattr(module, "_installed", lambda _name: "0.26.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _number=0: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (139 * GIB, 140 * GIB))
    monkeypatch.setattr(os, "execvp", lambda _file, command: started.append(command))
    return started


def test_serve_when_all_is_there_starts_vllm_with_options(run: Any, checkpoint: Path, machine: list[list[str]]) -> None:
    result = run("serve", checkpoint, "--port", "9000", "-tp=1", "--max-model-len", "512")
    assert result.exit_code == 0, result.output
    assert len(machine) == 1
    assert machine[0][1:] == ["serve", str(checkpoint), "--port", "9000", "-tp=1", "--max-model-len", "512"]
    for words in ("valid", "NVIDIA H200; 1 used", "kernel tiled_linear: cuda", "localhost:9000/v1/completions"):
        assert words in result.stdout


def test_serve_when_a_quantized_cache_is_asked_for_passes_it_on(
    run: Any, checkpoint: Path, machine: list[list[str]]
) -> None:
    result = run("serve", "--kv", "4", checkpoint, "--port", "9000")
    assert result.exit_code == 0, result.output
    assert machine[0][3:] == ["--port", "9000", "--additional-config", '{"kv_bits": 4}']
    assert "cache: keys and values of 4 bits" in result.stdout
    assert "in 4 bits, less" in result.stdout
    assert "kernel kv_page_attention: cuda" in result.stdout
    assert "cache: vLLM's own (--kv-cache-dtype fp8)" in run("serve", checkpoint, "--kv-cache-dtype", "fp8").stdout
    for options, words in (
        (["--kv-cache-dtype", "fp8", "--additional-config", '{"kv_bits": 8}'], "two caches"),
        (["--additional-config", "kv_bits"], "no JSON"),
    ):
        assert words in run("serve", checkpoint, *options).stderr
    assert "into the latter" in run("serve", "--kv", "8", checkpoint, "--additional-config", "{}").stderr


def test_serve_when_dry_run_starts_nothing(run: Any, checkpoint: Path, machine: list[list[str]]) -> None:
    assert run("serve", "--dry-run", checkpoint).exit_code == 0
    assert machine == []


def test_serve_without_vllm_and_gpu_says_both_at_once(run: Any, checkpoint: Path) -> None:
    result = run("serve", checkpoint)
    assert result.exit_code == 2
    for words in ("vLLM is not installed; run pip install", "no GPU", "mergequant generate"):
        assert words in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-tp", "2"], "there are 1 GPUs"),
        (["--gpu-memory-utilization", "much"], "no number"),
        (["--gpu-memory-utilization", "1.0"], "are in use"),
    ],
)
def test_serve_when_options_do_not_fit_the_machine_is_refused(
    run: Any, checkpoint: Path, machine: list[list[str]], arguments: list[str], words: str
) -> None:
    result = run("serve", checkpoint, *arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert machine == []


def test_serve_when_model_is_float_or_checkpoint_damaged_is_refused(
    run: Any, checkpoint: Path, tmp_path: Path, machine: list[list[str]]
) -> None:
    assert "no checkpoint of mergequant" in run("serve", "tiny").stderr
    for path in checkpoint.iterdir():
        data = path.read_bytes()
        (tmp_path / path.name).write_bytes(data[:-7] if path.suffix == ".safetensors" else data)
    assert "corrupt or truncated" in run("serve", tmp_path).stderr
    assert machine == []


def test_memory_report_counts_tokens_of_the_shard() -> None:
    text, fault = memory_report(LLAMA_7B, 4 * GIB, 140 * GIB, 139 * GIB, 0.9, 1)
    assert fault is None
    assert f"{(126 - 4) * GIB // (512 << 10):,} tokens" in text  # half a MiB for each token of Llama-2-7B
    halved, _ = memory_report(LLAMA_7B, 4 * GIB, 140 * GIB, 139 * GIB, 0.9, 2)
    assert f"{(126 - 2) * GIB // (256 << 10):,} tokens" in halved
    assert "do not fit" in str(memory_report(LLAMA_7B, 30 * GIB, 24 * GIB, 24 * GIB, 0.9, 1)[1])
