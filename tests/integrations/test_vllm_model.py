"""Checkpoints in a model of vLLM's shape: every tensor is placed, logits are `mergequant.load`'s on 1, 2 and 4 GPUs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import mergequant
from families import make_model
from mergequant import ops
from mergequant.checkpoint import open_checkpoint
from mergequant.errors import CheckpointError, InputError, UsageError
from mergequant.integrations.vllm.placement import Placement
from mergequant.integrations.vllm.served import ServedLinear, ServedNorm
from mergequant.integrations.vllm.sink import require_sink
from mergequant.nn import PrefixSpec
from vllm_stand_in import StandIn, logits, stand_ins

RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mergequant": ("mergequant", {}),
    "mergequant-plus": ("mergequant-plus", {"tile": 8}),
    "mergequant-w4a8": ("mergequant-w4a8", {"tile": 8}),
    "mergequant-static": (
        "mergequant",
        {"other": "static", "other_bits": 8, "other_split": 0.1, "stagger": True, "prefix": "bos"},
    ),
    "rtn": ("rtn", {}),
    "rtn-w4a16": ("rtn", {"activation_bits": 16, "group_size": 4}),
    "gptq": ("gptq", {"activation_bits": 4}),
    "smoothquant": ("smoothquant", {}),
    "qserve": ("qserve", {"group_size": 8}),
    "qllm": ("qllm", {"epochs": 1}),
    "flatquant": ("flatquant", {"epochs": 1}),
}
# Their o and down have a scale per token, which is found on the share.
PER_TOKEN = {"mergequant", "rtn", "gptq", "smoothquant", "qserve", "qllm"}
SUMS = 1e-5  # of the logits' spread: float sums in another order, which turn no code over here
IDS = torch.tensor([1, 30, 31, 32, 17, 20, 45, 12, 77, 90, 1, 33])

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """checkpoint(label, family): a tiny model, quantized once."""
    folder, known = tmp_path_factory.mktemp("vllm"), {}

    def make(label: str, family: str = "llama") -> Path:
        if (label, family) not in known:
            model = make_model(family)
            tokens = torch.randint(3, 97, (6, 24), generator=torch.Generator().manual_seed(7))
            tokens[:, 0] = 1
            recipe, settings = RECIPES[label]
            out = known[label, family] = folder / f"{label}-{family}"
            mergequant.quantize(model, recipe, out=out, data=tokens, samples=4, seqlen=24, settings=settings)
        return known[label, family]

    return make


def reference(folder: Path, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return mergequant.load(folder, dtype=torch.float32)(ids[None]).logits[0]


def served(folder: Path, size: int, ids: torch.Tensor = IDS) -> tuple[torch.Tensor, list[StandIn]]:
    group, models = stand_ins(open_checkpoint(folder), AutoConfig.from_pretrained(folder), size)
    return logits(group, models, ids), models


def deviation(got: torch.Tensor, want: torch.Tensor) -> float:
    """Largest difference over the spread of what is wanted."""
    return float((got - want).abs().max() / want.std())


@pytest.mark.parametrize("label", RECIPES)
def test_logits_are_those_of_the_reference_loader(checkpoint: Make, label: str) -> None:
    folder = checkpoint(label)
    want = reference(folder)
    for size in (1, 2, 4):
        got, models = served(folder, size)
        assert all(model.placement.filled == set(model.placement.places) for model in models)
        if size == 1 or label not in PER_TOKEN:
            assert deviation(got, want) < SUMS, f"{size} GPUs"
        else:
            assert torch.isfinite(got).all()


@pytest.mark.parametrize("label", RECIPES)
def test_layers_run_for_few_tokens_before_the_first_request(checkpoint: Make, label: str) -> None:
    _, models = served(checkpoint(label), 2)
    for module in models[0].modules():
        if isinstance(module, ServedNorm):
            module.warm(torch.float32)
        elif isinstance(module, ServedLinear):
            module.gather = lambda x: torch.cat((x, x), -1)
            module.warm()


@pytest.mark.parametrize("family", ["llama_tied_wide_heads", "llama_no_gqa", "qwen2"])
def test_biases_tied_heads_and_narrow_groups_are_served(checkpoint: Make, family: str) -> None:
    folder = checkpoint("mergequant-w4a8", family)
    want = reference(folder)
    for size in (1, 2, 4):
        assert deviation(served(folder, size)[0], want) < SUMS, f"{size} GPUs"


def test_a_cache_of_rotated_keys_is_ignored_as_any_stored_cache_is(checkpoint: Make, tmp_path: Path) -> None:
    folder = checkpoint("rtn")
    twin = Path(shutil.copytree(folder, tmp_path / "rotated"))
    config = json.loads((twin / "config.json").read_text())
    config["quantization_config"]["kv"]["key_rotation"] = ops.rotation(10).name
    (twin / "config.json").write_text(json.dumps(config))
    assert torch.equal(served(twin, 1)[0], served(folder, 1)[0])


def test_a_prompt_without_the_stored_token_is_not_given_its_keys(checkpoint: Make) -> None:
    folder, ids = checkpoint("mergequant-w4a8"), torch.tensor([5, 1, 6, 7])
    got, models = served(folder, 1, ids)
    models[0].sink, plain = None, models[0].sink
    assert plain is not None
    with torch.no_grad():
        assert torch.equal(models[0](ids), got)


def test_stored_token_counts_at_the_beginning_only(checkpoint: Make) -> None:
    folder = checkpoint("mergequant-w4a8")
    sink = served(folder, 1)[1][0].sink
    assert sink is not None
    positions = torch.tensor([7, 0, 1, 2, 0])  # a decode step, then two prompts
    rows = sink.find(torch.tensor([1, 1, 5, 1, 9]), positions)
    assert rows.tolist() == [False, True, False, False, False]
    assert sink.mark(rows, positions).tolist() == [7, -1, 1, 2, 0]
    assert sink.mark(rows, positions).data_ptr() == sink.marked.data_ptr()
    with pytest.raises(InputError, match="token ids"):
        sink.find(None, positions)


def test_prefix_of_several_tokens_is_refused() -> None:
    with pytest.raises(UsageError, match="prefix=bos"):
        require_sink(PrefixSpec((1, 5), True, 2, 2, 10, 10, 40))


def test_a_lost_or_changed_tensor_is_an_error(checkpoint: Make) -> None:
    folder = checkpoint("mergequant")
    opened, config = open_checkpoint(folder), AutoConfig.from_pretrained(folder)
    _, models = stand_ins(opened, config, 1)
    tensors = opened.tensors()
    name = "model.layers.1.mlp.down_proj.weight_scale"
    placement = Placement()
    placement.places = dict(models[0].placement.places)
    list(placement.take((key, value) for key, value in tensors.items() if key != name))
    with pytest.raises(CheckpointError, match=r"missing tensors model\.layers\.1\.mlp\.down_proj\.weight_scale"):
        placement.require_all()
    with pytest.raises(CheckpointError, match="description needs"):
        list(placement.take([(name, tensors[name][:-1])]))
    assert [key for key, _ in placement.take([("model.norm.weight", tensors["model.norm.weight"])])]


def test_layers_that_the_model_lacks_are_an_error(checkpoint: Make) -> None:
    folder = checkpoint("mergequant")
    config = AutoConfig.from_pretrained(folder)
    config.num_hidden_layers = 1
    with pytest.raises(CheckpointError, match="none of this name"):
        stand_ins(open_checkpoint(folder), config, 1)


def test_loading_twice_is_refused_in_words(checkpoint: Make) -> None:
    _, models = served(checkpoint("mergequant"), 1)
    linear = next(module for module in models[0].modules() if isinstance(module, ServedLinear))
    linear.finish()
    with pytest.raises(UsageError, match="start the engine anew"):
        linear.place(Placement())


def test_shares_of_a_weight_hold_it_once(checkpoint: Make) -> None:
    """Codes of all GPUs together are the checkpoint's: none twice, none lost."""
    folder = checkpoint("mergequant-w4a8")
    whole = served(folder, 1)[1][0]
    for size in (2, 4):
        models = served(folder, size)[1]
        for name in (
            "model.layers.0.mlp.gate_up_proj",
            "model.layers.1.mlp.down_proj",
            "model.layers.1.self_attn.o_proj",
        ):
            parts = [model.get_submodule(name).mergequant_served for model in models]
            alone = whole.get_submodule(name).mergequant_served
            assert sum(part.columns.columns.numel() if part.columns else 0 for part in parts) in (0, alone.width)
            rows = sum(part.weight_scale.shape[0] for part in parts)
            assert rows == alone.weight_scale.shape[0] * (1 if parts[0].columns is None else size)
