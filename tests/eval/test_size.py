from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergequant.errors import ModelError, WeightsError
from mergequant.eval import folder_size, memory_size


def test_size_when_float32_folder_is_32_bits_and_counts_tied_once(folder: Path, model: Any) -> None:
    size = folder_size(folder, model.config)
    assert size.bits_per_parameter == 32
    assert size.linear_bits_per_parameter == 32
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.linear_parameters == sum(p.numel() for p in model.model.layers.parameters())
    assert memory_size(model, model.config) == size


def test_size_when_sharded_and_mixed_counts_every_byte_of_the_index_only(
    folder: Path, model: Any, tmp_path: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {name: tensors[name].bfloat16() for name in names}
    halves["model.layers.0.mlp.down_proj.extra_index"] = torch.zeros(3, dtype=torch.int16)
    model.save_pretrained(tmp_path)  # config only matters
    (tmp_path / "model.safetensors").unlink()
    parts = {"model-00001.safetensors": names[:5], "model-00002.safetensors": [n for n in halves if n not in names[:5]]}
    for file, part in parts.items():
        save_file({name: halves[name] for name in part}, tmp_path / file)
    save_file({"stray": torch.zeros(1000)}, tmp_path / "other.safetensors")
    index = ", ".join(f'"{name}": "{file}"' for file, part in parts.items() for name in part)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {' + index + "}}")
    size = folder_size(tmp_path, model.config)
    assert size.bytes == 2 * size.parameters + 6
    assert size.linear_bytes == 2 * size.linear_parameters + 6


def test_size_when_header_is_corrupt_or_missing_raises(folder: Path, model: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no \.safetensors"):
        folder_size(tmp_path, model.config)
    data = (folder / "model.safetensors").read_bytes()
    for broken in (data[:4], data[:60], b"\xff" * 64, data[:8] + b"[" + data[9:]):
        (tmp_path / "model.safetensors").write_bytes(broken)
        with pytest.raises(WeightsError, match=r"model\.safetensors"):
            folder_size(tmp_path, model.config)
