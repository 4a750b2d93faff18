import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mergequant.data import draw_windows, head_windows, sketch, sketch_to_json
from mergequant.errors import ModelError, OverlapError, UsageError
from mergequant.eval import evaluate, results_table


def text_of(table: Any) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    console.file.close()
    return console.export_text()


def test_evaluate_when_float_folder_reports_it_as_float(folder: Path, text_file: Path) -> None:
    report = evaluate(folder, data=str(text_file), samples=3, seqlen=32).to_dict()
    assert report["quantized"] is None
    assert report["float"]["bits_per_parameter"] == 32
    assert report["kl_mean"] is None
    assert report["protocol"]["bos"] is True
    assert report["protocol"]["predicted_tokens"] == 3 * 31
    assert json.loads(json.dumps(report)) == report


def test_evaluate_when_against_is_given_reports_both_and_their_distance(
    folder: Path, other_model: Any, text_file: Path, tokenizer: Any
) -> None:
    result = evaluate(other_model, folder, data=str(text_file), samples=3, seqlen=32, tokenizer=tokenizer)
    report = result.to_dict()
    for model in ("quantized", "float"):
        assert {"perplexity", "nll", "nll_standard_error", "bits_per_parameter", "bytes", "tokens_per_second"} <= set(
            report[model]
        )
    assert report["nll_increase"] == pytest.approx(report["quantized"]["nll"] - report["float"]["nll"])
    assert report["kl_p99"] > report["kl_mean"] > 0
    assert 0 <= report["top1_agreement"] <= 1
    lines = text_of(results_table({"first": result, "second": result}))
    assert [lines.count(word) for word in ("float", "first", "second")] == [1, 1, 1]
    assert "…" not in text_of(result.table("mergequant-w4a8"))


def test_evaluate_when_repeated_gives_equal_figures(folder: Path) -> None:
    runs = [evaluate(folder, data="self", samples=3, seqlen=24, seed=s) for s in (0, 0, 1)]
    first, again, other = (run.to_dict()["float"]["nll"] for run in runs)
    assert first == again
    assert first != other


def test_evaluate_when_self_data_without_float_model_raises(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--against"):
        evaluate(_with_sketches(folder, tmp_path / "q", {}), data="self", samples=2, seqlen=24)


def _with_sketches(folder: Path, target: Path, provenance: dict[str, Any]) -> Path:
    """A folder that says it is quantized; good enough for everything that happens before it is loaded."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mergequant", "provenance": provenance}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("key", ["calibration_sketch", "held_out_sketch"])
def test_evaluate_when_data_was_used_before_refuses_before_loading(
    folder: Path, text_file: Path, tokenizer: Any, tmp_path: Path, key: str
) -> None:
    used = draw_windows(str(text_file), tokenizer, samples=10, seqlen=100, seed=0)
    quantized = _with_sketches(folder, tmp_path / "q", {key: sketch_to_json(sketch(used.tokens))})
    (quantized / "model.safetensors").write_bytes(b"")  # loading would fail
    with pytest.raises(OverlapError, match="held-out" if "held" in key else "calibration"):
        evaluate(quantized, folder, data=str(text_file), samples=None, seqlen=64)


def test_evaluate_when_data_is_new_says_that_it_was_checked(
    model: Any, text_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    used = head_windows([text_file.read_text()[::-1]], tokenizer, samples=10, seqlen=100)
    assert not evaluate(model, data=str(text_file), samples=2, seqlen=64).protocol["overlap_checked"]
    model.config.quantization_config = {"provenance": {"calibration_sketch": sketch_to_json(sketch(used.tokens))}}
    report = evaluate(model, data=str(text_file), samples=2, seqlen=64)
    assert report.protocol["overlap_checked"]
    assert report.quantized is not None
    assert report.float_ is None


def test_evaluate_when_model_was_quantized_in_memory_does_not_take_the_float_folders_size(
    model: Any, text_file: Path
) -> None:
    assert evaluate(model, data=str(text_file), samples=1, seqlen=32).float_.size.bits_per_parameter == 32  # type: ignore[union-attr]
    model.config.quantization_config = {"quant_method": "mergequant"}
    model.to(torch.bfloat16)
    assert evaluate(model, data=str(text_file), samples=1, seqlen=32).quantized.size.bits_per_parameter == 16  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seqlen": 129}, UsageError, "at most 128 positions"),
        ({"seqlen": 1}, UsageError, "--seqlen"),
        ({"samples": 0}, UsageError, "--samples"),
        ({"model": "no/such"}, ModelError, "no such folder"),
        ({"kv_bits": 5}, UsageError, "--kv 5: choose one of 16, 8, 4"),
        ({"kv_bits": 8}, UsageError, "--kv 8: .*float model"),
        ({"kv_bits": 4, "tasks": "copa"}, UsageError, "leave out --kv 4"),
    ],
)
def test_evaluate_when_used_wrongly_says_so(
    folder: Path, text_file: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {"model": folder, "data": str(text_file), "seqlen": 32} | options
    with pytest.raises(error, match=message):
        evaluate(**arguments)


def test_evaluate_when_folder_is_broken_raises_model_error(tmp_path: Path, text_file: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json"):
        evaluate(tmp_path, data=str(text_file))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        evaluate(tmp_path, data=str(text_file))


def test_evaluate_when_bundled_model_predicts_text_better_than_chance(text_file: Path) -> None:
    from mergequant.assets import TINY

    report = evaluate(TINY, data=["The river is a large stone bridge in the north of the city . " * 3], seqlen=32)
    assert report.float_ is not None
    assert report.float_.likelihood.nll < 6.5  # a uniform guess over 8192 tokens costs 9.0
