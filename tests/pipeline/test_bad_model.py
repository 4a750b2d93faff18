"""Models that cannot be quantized, through `mergequant.quantize`: the right error, and nothing that looks whole.

The parts test their own messages at length; here it is shown that they reach the user, and what is left behind.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import mergequant
from families import make_model
from mergequant import errors

Run = Callable[..., mergequant.Quantized]
Windows = Callable[..., Tensor]


def shard_of(model: Path, tensor: str) -> Path:
    index = json.loads((model / "model.safetensors.index.json").read_text())
    return model / index["weight_map"][tensor]


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def test_quantize_when_a_shard_is_missing_names_it(model: Path, refused: Callable[..., str]) -> None:
    shard = shard_of(model, "model.layers.1.mlp.down_proj.weight")
    shard.unlink()
    assert shard.name in refused(errors.WeightsError, model)


def test_quantize_when_a_shard_is_truncated_names_it(model: Path, refused: Callable[..., str]) -> None:
    shard = shard_of(model, "model.layers.1.mlp.down_proj.weight")
    shard.write_bytes(shard.read_bytes()[:-7])
    assert shard.name in refused(errors.WeightsError, model)


def test_quantize_when_a_header_is_corrupt_names_the_shard(model: Path, refused: Callable[..., str]) -> None:
    shard = shard_of(model, "model.layers.0.mlp.up_proj.weight")
    data = shard.read_bytes()
    shard.write_bytes(data[:9] + b"\xff\xff" + data[11:])
    assert shard.name in refused(errors.WeightsError, model)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_quantize_when_a_weight_is_not_finite_names_tensor_and_place(
    name: str, value: float, model: Path, refused: Callable[..., str]
) -> None:
    edit(shard_of(model, name), lambda tensors: tensors[name][3, 5].fill_(value))
    message = refused(errors.WeightsError, model)
    assert name in message
    assert "(3, 5)" in message


def test_quantize_when_a_later_block_is_damaged_keeps_the_earlier_ones(
    model: Path, out: Path, refused: Callable[..., str], run: Run, windows: Windows
) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    edit(shard_of(model, name), lambda tensors: tensors[name][0, 0].fill_(float("nan")))
    refused(errors.WeightsError, model)
    assert (out.with_name("out.partial") / "block-00000.safetensors").exists()
    # The repaired model is another one: nothing of the damaged one's run may enter its checkpoint.
    edit(shard_of(model, name), lambda tensors: tensors[name][0, 0].fill_(0.25))
    tokens = windows(make_model("llama"))
    resumed = run(model, "mergequant", out, data=tokens)
    fresh = run(model, "mergequant", out.with_name("fresh"), data=tokens)
    files = [result.folder / "model.safetensors" for result in (resumed, fresh)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_quantize_when_config_disagrees_with_tensors_names_the_tensor(model: Path, refused: Callable[..., str]) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    assert "mlp.gate_proj.weight" in refused(errors.WeightsError, model)


def test_quantize_when_shard_name_leaves_the_folder_does_not_read_it(model: Path, refused: Callable[..., str]) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))
    assert "outside the folder" in refused(errors.WeightsError, model)


def test_quantize_when_no_site_can_be_proven_says_so(refused: Callable[..., str]) -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=64))  # Conv1D layers
    assert "nothing to quantize" in refused(errors.StructureError, gpt2)


def test_quantize_when_model_is_quantized_already_says_so(
    model: Path, tmp_path: Path, refused: Callable[..., str], run: Run, windows: Windows
) -> None:
    run(model, "rtn", tmp_path / "first", data=windows(make_model("llama")))
    assert "already quantized (mergequant)" in refused(errors.UsageError, tmp_path / "first")
    assert "already quantized" in refused(errors.UsageError, mergequant.load(tmp_path / "first"))


@pytest.mark.parametrize("recipe", ["mergequant", "gptq", "rtn"])
def test_quantize_when_activations_overflow_names_the_layer(recipe: str, refused: Callable[..., str]) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(1e30)
        model.model.layers[1].mlp.gate_proj.weight.fill_(1e30)
    message = refused(errors.NumericsError, model, recipe)
    assert "model.layers.1" in message
    assert "channel" in message
