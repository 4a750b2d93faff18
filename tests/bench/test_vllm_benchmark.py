"""The benchmark inside vLLM, as far as it goes without vLLM: folders, random codes, tables."""

import argparse
import importlib
import json
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import mergequant
from mergequant.checkpoint import open_checkpoint
from mergequant.nn import LinearSpec

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "vllm"
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "max_position_embeddings": 64,
    "rope_theta": 10000.0,
}


@pytest.fixture(scope="module")
def modules() -> tuple[ModuleType, ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        return importlib.import_module("schemes"), importlib.import_module("run")


@pytest.mark.parametrize("scheme", ["ours-w4a8", "ours-w4a4-dynamic", "ours-w4a4-kv4"])
def test_folder_of_ours_is_a_whole_checkpoint_of_sane_numbers(
    scheme: str, modules: tuple[ModuleType, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schemes, _ = modules
    monkeypatch.setitem(schemes.SHAPES, "small", SMALL)
    monkeypatch.setattr(schemes, "EXTRA", 0.5)
    folder = schemes.write_folder("small", scheme, tmp_path)
    shard = min(folder.glob("*.safetensors"))
    shard.unlink()
    assert schemes.write_folder("small", scheme, tmp_path) == folder
    assert shard.is_file()
    described = open_checkpoint(folder).quantization
    specs = described.layers
    assert (described.kv is not None) == bool(schemes.SCHEMES[scheme].arguments) == scheme.endswith("kv4")
    assert {spec.weight_bits for spec in specs.values() if isinstance(spec, LinearSpec)} == {4}
    assert specs["model.layers.0.input_layernorm"].width == 192
    with torch.no_grad():
        hidden = mergequant.load(folder).model(torch.tensor([[1, 5, 9, 33]])).last_hidden_state
    assert hidden.isfinite().all()
    assert 0.5 < hidden.float().std() < 2


def test_folder_of_a_rival_is_a_config_alone(modules: tuple[ModuleType, ModuleType], tmp_path: Path) -> None:
    folder = modules[0].write_folder("llama-2-7b", "w4a8-humming", tmp_path, layers=3)
    assert not list(folder.glob("*.safetensors"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    group = config["quantization_config"]["config_groups"]["group_0"]
    assert (config["num_hidden_layers"], group["weights"]["num_bits"], group["input_activations"]["dynamic"]) == (
        3,
        4,
        True,
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_have_mean_zero_and_lie_on_the_grid(bits: int, modules: tuple[ModuleType, ModuleType]) -> None:
    codes = modules[0].random_codes((256, 256), bits, torch.Generator().manual_seed(0)).float()
    high = 2 ** (bits - 1) - 1
    assert abs(codes.mean()) < 0.01 * high
    assert (codes.min(), codes.max()) == (-high, high)


def _run(scheme: str, kernel: str, decode: float, prefill: float, **more: Any) -> dict[str, Any]:
    figures = {f"decode_{batch}": {"gpu_ms": decode, "wall_ms": decode} for batch in (1, 16, 64)}
    return {
        "scheme": scheme,
        "round": 0,
        "workers": [{"kernels": {kernel: 128}, "weight_gib": 3.5}],
        "prefill_1": {"gpu_ms": prefill, "wall_ms": prefill},
        "prefill_16": {"tokens_per_second": 1e6 / prefill},
        "end_to_end": {"tokens_per_second": 1e4 / decode},
        **figures,
        **more,
    }


def test_summary_takes_the_best_rival_that_its_own_kernel_served(modules: tuple[ModuleType, ModuleType]) -> None:
    _, run = modules
    runs = [
        _run("bf16", "UnquantizedLinearMethod", 4.3, 45.0),
        _run("w4a8-humming", "CompressedTensorsLinearMethod/WNA16/MacheteLinearKernel", 1.0, 10.0),
        _run("int8", "CompressedTensorsLinearMethod/W8A8Int8/CutlassInt8ScaledMMLinearKernel", 3.2, 27.0),
        _run("ours-w4a8", "MergeQuantLinearMethod of mergequant", 2.0, 20.0),
        _run("ours-w4a8", "MergeQuantLinearMethod of mergequant", 2.2, 22.0),
        {"scheme": "fp8", "round": 0, "error": "no memory"},
    ]
    results = {"shape": "llama-2-7b", "tensor_parallel": 1, "kv": "auto", "versions": {"vllm": "0.26.0"}, "runs": runs}
    summary = run.summarise(results)
    assert "Machete" in summary["w4a8-humming"]["fault"]
    assert summary["ours-w4a8"]["fault"] == ""
    assert summary["ours-w4a8"]["spread"]["decode b1, GPU ms"] == pytest.approx(0.2 / 2.1)
    ratio, best = run.ratios(summary)["ours-w4a8"]["decode b1, GPU ms"]
    assert (best, ratio) == ("int8", pytest.approx(3.2 / 2.1))
    text = run.table(results)
    assert "| fp8 (!) | - |" in text
    assert "(!) fp8: no memory" in text


def test_schemes_run_side_by_side_each_on_gpus_of_its_own(modules: tuple[ModuleType, ModuleType]) -> None:
    _, run = modules
    together, lock, taken, most = threading.Barrier(2, timeout=5), threading.Lock(), set[str](), [0]

    def measure(name: str, place: str) -> str:
        with lock:
            assert place not in taken
            taken.add(place)
            most[0] = max(most[0], len(taken))
        together.wait()  # nobody gets here alone
        with lock:
            taken.remove(place)
        return f"{name} on {place}"

    found = dict(run.side_by_side(["a", "b", "c", "d"], ["0", "1"], measure))
    assert sorted(found) == ["a", "b", "c", "d"]
    assert most == [2]
    assert {text.rpartition(" ")[2] for text in found.values()} == {"0", "1"}


def test_one_place_keeps_the_order_and_a_fault_ends_what_waits(modules: tuple[ModuleType, ModuleType]) -> None:
    _, run = modules
    started: list[str] = []
    assert dict(run.side_by_side("abc", ["0"], lambda name, _: started.append(name))) == dict.fromkeys("abc")
    assert started == ["a", "b", "c"]

    def broken(name: str, _: str) -> str:
        raise OSError("no memory")

    with pytest.raises(OSError, match="no memory"):
        list(run.side_by_side("abc", ["0"], broken))


ENGINE = """
import json, os, sys, time
from pathlib import Path
out = Path(sys.argv[2])
if out.stem == "fp8":
    sys.exit("no such kernel")
out.with_suffix(".ready").touch()
while not out.with_suffix(".turn").exists():
    time.sleep(0.01)
ready = len(list(out.parent.glob("*.ready")))
out.write_text(json.dumps({"ready": ready, "at": time.time(), "gpu": os.environ["CUDA_VISIBLE_DEVICES"]}))
time.sleep(60)
"""


def test_engines_of_a_gpu_start_together_and_are_measured_in_turn(
    modules: tuple[ModuleType, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = modules
    (tmp_path / "engine.py").write_text(ENGINE)
    monkeypatch.setattr(run, "HERE", tmp_path)
    given = argparse.Namespace(
        quick=True, tensor_parallel=1, kv="auto", minutes=1, together=3, folders=tmp_path, path=[]
    )
    names = ("bf16", "fp8", "int8")
    found: dict[str, dict[str, Any]] = {}
    run._run(names, "3", dict.fromkeys(names, tmp_path), given, lambda name, figures: found.update({name: figures}))
    first, broken, last = (found[name] for name in names)
    assert first["ready"] == last["ready"] == 2
    assert first["at"] < last["at"]
    assert first["gpu"] == "3"
    assert "no such kernel" in broken["error"]
    assert not run.PROCESSES


def test_gpus_are_cut_into_groups_of_those_that_may_be_used(
    modules: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = modules
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert run.gpu_groups(4, 1) == ["0", "1", "2", "3"]
    assert run.gpu_groups(5, 2) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,2")
    assert run.gpu_groups(2, 1) == ["6", "2"]
    for gpus, each in ((3, 1), (1, 2)):
        with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES is 6,2"):
            run.gpu_groups(gpus, each)
