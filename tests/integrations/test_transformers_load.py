"""Loading by `load` and by transformers' own `from_pretrained`, and saving again."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging

from mergequant.checkpoint import open_checkpoint
from mergequant.errors import CheckpointError, UsageError
from mergequant.integrations.transformers import MergeQuantConfig, load, register
from mergequant.nn import QuantLinear

FAMILIES = ("llama", "llama_tied", "opt")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.tensor([[1, 5, 9, 33, 4, 12, 7]])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_load_when_saved_by_writer_gives_equal_logits(
    family: str, saved: Callable[..., Any], ids: torch.Tensor
) -> None:
    model, folder = saved(family)
    assert torch.equal(load(folder, dtype=torch.float32)(ids).logits, model(ids).logits)


@torch.no_grad()
def test_load_when_prefix_is_stored_gives_equal_logits(saved: Callable[..., Any], ids: torch.Tensor) -> None:
    model, folder = saved("llama", prefix=(1, 8))
    loaded = load(folder)
    assert torch.equal(loaded.model.mergequant_prefix.keys, model.model.mergequant_prefix.keys)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_from_pretrained_when_registered_warns_of_nothing(family: str, saved: Callable[..., Any]) -> None:
    _, folder = saved(family, prefix=(1,), kv=True)
    register()
    register()
    messages: list[str] = []
    logger = logging.get_logger("transformers.modeling_utils")
    handler = type(
        "Keep", (__import__("logging").Handler,), {"emit": lambda _, record: messages.append(str(record.msg))}
    )()
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    finally:
        logger.removeHandler(handler)
    assert not messages
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_load_when_dtype_is_given_keeps_scales_in_float32(
    dtype: torch.dtype, saved: Callable[..., Any], ids: torch.Tensor
) -> None:
    model, folder = saved("llama", prefix=(1,), kv=True)
    loaded = load(folder, dtype=dtype)
    want = dict(model.named_buffers())
    for name, buffer in loaded.named_buffers():
        if "rotary" not in name:
            assert torch.equal(buffer, want[name]), name
    assert {m.out_dtype for m in loaded.modules() if isinstance(m, QuantLinear)} == {dtype}
    logits = loaded(ids).logits
    assert logits.dtype == dtype
    reference = model(ids).logits
    assert (logits.float() - reference).norm() / reference.norm() < (1e-6 if dtype == torch.float32 else 0.15)
    tokens = loaded.generate(ids, max_new_tokens=3, do_sample=False)
    assert tokens.shape == (1, 10)


@torch.no_grad()
def test_load_when_dtype_is_left_out_takes_the_configs(saved: Callable[..., Any]) -> None:
    _, folder = saved("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    loaded = load(folder)
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight.dtype == torch.bfloat16


@torch.no_grad()
def test_auto_model_when_head_is_left_out_gives_hidden_states(saved: Callable[..., Any], ids: torch.Tensor) -> None:
    model, folder = saved("llama_tied", prefix=(1,), kv=True)
    body = AutoModel.from_pretrained(folder)
    assert torch.equal(body.mergequant_kv.key_scale_8, model.model.mergequant_kv.key_scale_8)
    assert torch.equal(body(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("kv", [False, True])
@pytest.mark.parametrize(("family", "prefix"), [("llama", None), ("llama_tied", (1, 8)), ("opt", (1,))])
@torch.no_grad()
def test_save_pretrained_when_loaded_gives_equal_checkpoint(
    family: str, prefix: tuple[int, ...] | None, kv: bool, saved: Callable[..., Any], ids: torch.Tensor, tmp_path: Path
) -> None:
    _, folder = saved(family, prefix=prefix, kv=kv)
    loaded = load(folder)
    loaded.save_pretrained(tmp_path / "again")
    first, again = open_checkpoint(folder), open_checkpoint(tmp_path / "again")
    again.validate()
    assert again.config["quantization_config"] == first.config["quantization_config"]
    assert again.names() == first.names()
    assert any("mergequant_kv.value_scale_4" in name for name in again.names()) == kv
    assert all(torch.equal(first.get(name), again.get(name)) for name in first.names())
    assert torch.equal(load(tmp_path / "again")(ids).logits, loaded(ids).logits)


def test_from_pretrained_when_model_is_float_refuses_our_config(build: Callable[..., Any], tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "float")
    with pytest.raises(UsageError, match="mergequant quantize"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=MergeQuantConfig())


def test_load_when_folder_is_missing_names_near_ones(tmp_path: Path) -> None:
    (tmp_path / "tiny-w4a4").mkdir()
    with pytest.raises(CheckpointError, match="tiny-w4a4"):
        load(tmp_path / "tiny-w4a")


def test_load_when_model_is_float_points_to_transformers(build: Callable[..., Any], tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "float")
    with pytest.raises(CheckpointError, match="AutoModelForCausalLM"):
        load(tmp_path / "float")


def test_load_when_shard_is_truncated_refuses(saved: Callable[..., Any]) -> None:
    _, folder = saved("llama")
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        load(folder)


def test_from_pretrained_when_index_is_out_of_range_refuses(saved: Callable[..., Any], tmp_path: Path) -> None:
    loaded = load(saved("llama")[1])
    loaded.model.layers[1].input_layernorm.index[3] = 32
    loaded.save_pretrained(tmp_path / "broken")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.input_layernorm\.index.*32"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "broken")


def test_load_when_config_names_unknown_layer_refuses(saved: Callable[..., Any]) -> None:
    _, folder = saved("llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1"):
        load(folder)


def test_load_when_loaded_is_in_evaluation_mode_and_not_trainable(saved: Callable[..., Any]) -> None:
    loaded = load(saved("llama")[1])
    assert not loaded.training
    assert not loaded.hf_quantizer.is_trainable
    assert loaded.hf_quantizer.is_serializable()
