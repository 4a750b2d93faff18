import json
from pathlib import Path

import pytest

from mergequant.bench import SHAPES, folder_shape, named_shape, parameters
from mergequant.bench.shapes import cache_bytes, head_parameters, layer_linears, linear_parameters
from mergequant.errors import ModelError, UsageError


# As the models' own cards say, in billions. llama-2-70b-layer holds 4 of 80 layers.
@pytest.mark.parametrize(("name", "billions"), [("llama-2-7b", 6.74), ("llama-3-8b", 8.03), ("qwen3-8b", 8.19)])
def test_parameters_are_those_of_the_model(name: str, billions: float) -> None:
    assert parameters(SHAPES[name]) / 1e9 == pytest.approx(billions, abs=0.005)


def test_parts_of_llama_2_7b() -> None:
    shape = SHAPES["llama-2-7b"]
    assert linear_parameters(shape) == 6_476_005_376
    assert head_parameters(shape) == 131_072_000
    assert cache_bytes(shape, 1, 2048, 16) == 2 * 32 * 4096 * 2048 * 2 == 1_073_741_824
    assert cache_bytes(shape, 1, 2048, 4) * 4 == cache_bytes(shape, 1, 2048, 16)


def test_grouped_query_heads_shrink_qkv_and_cache() -> None:
    shape = SHAPES["llama-3-8b"]
    assert layer_linears(shape) == {
        "qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336),
    }  # fmt: skip
    assert cache_bytes(shape, 1, 2048, 16) * 4 == cache_bytes(SHAPES["llama-2-7b"], 1, 2048, 16)


def test_layers_can_be_fewer() -> None:
    assert linear_parameters(named_shape("llama-2-7b", 2)) * 16 == linear_parameters(named_shape("llama-2-7b"))


def test_misspelt_shape_suggests_near_one() -> None:
    with pytest.raises(UsageError, match="did you mean 'llama-2-7b'"):
        named_shape("lama-2-7b")


def _config(folder: Path, **changes: object) -> Path:
    config = {
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 96,
        "vocab_size": 100,
        "rope_parameters": {"rope_theta": 1e6},
    }
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_shape_of_folder_reads_its_config(tmp_path: Path) -> None:
    shape = folder_shape(_config(tmp_path))
    assert (shape.head_width, shape.kv_heads, shape.qk_norm, shape.rope_theta) == (32, 2, True, 1e6)
    assert folder_shape(tmp_path, layers=1).layers == 1
    assert folder_shape(_config(tmp_path, model_type="qwen2")).qkv_bias


def test_folder_that_is_no_such_decoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="opt"):
        folder_shape(_config(tmp_path, model_type="opt"))
    _remove(_config(tmp_path), "hidden_size")
    with pytest.raises(ModelError, match="hidden_size"):
        folder_shape(tmp_path)
    with pytest.raises(ModelError, match=r"config\.json"):
        folder_shape(tmp_path / "nowhere")


def _remove(folder: Path, key: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config[key]
    (folder / "config.json").write_text(json.dumps(config))
