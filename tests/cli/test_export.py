import json
from pathlib import Path
from typing import Any


def test_export_writes_what_it_says(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    result = run("export", checkpoint, "--out", tmp_path / "out", "--json", tmp_path / "made.json")
    assert result.exit_code == 0, result.output
    for words in ("42 x W8A8, scale per token", "differs: inputs of 42 layers, codes of 4 bits", "vllm serve"):
        assert words in result.stdout
    made = json.loads((tmp_path / "made.json").read_text(encoding="utf-8"))
    assert made["schemes"] == {"W8A8, scale per token": 42}
    assert made["size"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_export_of_float_model_is_refused(run: Any, tmp_path: Path) -> None:
    result = run("export", "tiny", "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "no quantized checkpoint" in result.stderr
