import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mergequant.assets import TINY

QUICK = ["--device", "cpu", "--batch", "2", "--context", "32", "--layers", "1", "--repeat", "1", "--new-tokens", "3"]
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def _document(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_bench_prints_tables_and_ends_with_one_json_document(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    result = run("bench", "tiny", *QUICK, "--against", "bf16", "--kv", "16,8,4", "--json", path)
    found = _document(result)
    assert found == json.loads(path.read_text())
    assert found["shape"]["name"] == "tiny"
    assert found["shape"]["layers"] == 1
    assert found["command"] == (
        "mergequant bench tiny --against bf16 --batch 2 --context 32 --kv 16,8,4 --new-tokens 3 --repeat 1 --layers 1"
    )
    rows = {(row["phase"], row["scheme"], row["kv"], row["what"]): row for row in found["rows"]}
    assert {phase for phase, *_ in rows} == {"memory", "gemm", "prefill", "decode", "e2e"}
    for kv in (16, 8, 4):
        decode = rows["decode", "w4a8", kv, None]
        assert decode["ms"] > 0
        assert decode["vs_bf16"] > 0
        assert decode["vs_fp8"] is None
        assert decode["percent_of_ceiling"] is None
        assert any("kv_attention" in kernel for kernel in decode["kernels"])
    assert rows["decode", "bf16", 16, None]["vs_bf16"] == 1
    assert rows["memory", "w4a8", None, "weights"]["vs_bf16"] > 1
    assert rows["memory", "w4a8", 4, "cache"]["vs_bf16"] == 4
    assert {row["what"] for row in found["rows"] if row["phase"] == "gemm"} == {"qkv", "o", "gate_up", "down"}
    for words in ("end to end", "2 x 32 + 3", "w4a8 kv8", "gate_up", "vs bf16"):
        assert words in result.stdout


def test_bench_json_alone_is_one_line(run: Any) -> None:
    result = run("bench", TINY, *QUICK, "--phases", "prefill", "--kv", "4", "--json", "-")
    assert len(result.stdout.splitlines()) == 1
    rows = _document(result)["rows"]
    assert [(row["scheme"], row["kv"]) for row in rows] == [("bf16", 16), ("fp8", 16), ("w4a8", 4)]


@needs_no_gpu
def test_bench_without_gpu_says_what_to_do(run: Any) -> None:
    result = run("bench", "llama-2-7b")
    assert result.exit_code == 2
    assert "--device cpu" in result.stderr
    assert "needs an NVIDIA GPU" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["lama-2-7b"], "did you mean 'llama-2-7b'?"),
        (["llama-3-8b", "--phases", "decode,prefil"], "did you mean 'prefill'?"),
        (["llama-3-8b", "--against", "fp16"], "choose of bf16, fp8"),
        (["llama-3-8b", "--batch", "1,x"], "1,16,64"),
        (["llama-3-8b", "--context", "0"], "positive"),
        (["llama-3-8b", "--kv", "3"], "16, 8, 4"),
        (["llama-3-8b", "--layers", "0"], "--layers"),
    ],
)
def test_bench_wrong_use_exits_2(run: Any, arguments: list[str], words: str) -> None:
    result = run("bench", *arguments, "--device", "cpu")
    assert result.exit_code == 2, result.output
    assert words in result.stderr


def test_bench_of_other_architecture_exits_1(run: Any, tmp_path: Path) -> None:
    config = json.loads((TINY / "config.json").read_text())
    shutil.copytree(TINY, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "model_type": "opt"}))
    result = run("bench", tmp_path / "m", *QUICK)
    assert result.exit_code == 1
    assert "'opt' cannot be measured" in result.stderr


def test_bench_of_checkpoint_measures_its_own_decoder(run: Any, checkpoint: Path) -> None:
    arguments = ["--device", "cpu", "--batch", "1", "--context", "64", "--repeat", "1", "--phases", "decode,memory"]
    result = run("bench", checkpoint, *arguments, "--against", "bf16", "--kv", "8")
    assert {row["scheme"] for row in _document(result)["rows"]} == {"bf16", "w4a8"}
    refused = run("bench", checkpoint, *arguments, "--layers", "1")
    assert refused.exit_code == 2
    assert "--layers is for shapes" in refused.stderr
