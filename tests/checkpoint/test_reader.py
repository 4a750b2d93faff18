"""One hostile checkpoint per rule of docs/format.md, and what the reader gives of a good one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergequant import ops
from mergequant.checkpoint import count_bits, expected_tensors, model_card, open_checkpoint, writer
from mergequant.errors import CheckpointError, VersionError
from mergequant.nn import InputSpec, LinearSpec

KEYS = "model.mergequant_kv.key_scale_"
BOOKS = "model.layers.0.books"
QKV, OUT, NORM, MLP, TWO = (f"model.layers.0.{name}" for name in ("attn.q_proj", "attn.o_proj", "norm", "mlp", "two"))
SPARSE = "model.layers.0.sparse"


@pytest.fixture
def folder(write: Callable[..., Path]) -> Path:
    return write()


@pytest.fixture
def sharded(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(writer, "LARGEST_SHARD", 600)
    return write()


def _edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def _edit_tensors(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], name: str = "model.safetensors"
) -> None:
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / name).items()}
    change(tensors)
    save_file(tensors, folder / name)


def _refused(folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(folder).validate()


def test_validate_when_rewritten_by_another_tool_accepts(folder: Path) -> None:
    _edit_tensors(folder, lambda tensors: None)
    open_checkpoint(folder).validate()


def test_open_when_folder_is_missing_says_so(tmp_path: Path) -> None:
    _refused(tmp_path / "nowhere", "no such folder")


@pytest.mark.parametrize(("text", "match"), [(None, "is missing"), ("{", "JSON"), ('"x"', "no quantized checkpoint")])
def test_rule_1_when_config_is_no_object_refuses(text: str | None, match: str, folder: Path) -> None:
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    _refused(folder, match)


def test_rule_2_when_method_is_another_points_to_transformers(folder: Path) -> None:
    _edit_config(folder, lambda q: q.update(quant_method="gptq"))
    _refused(folder, "'gptq'.*AutoModelForCausalLM")


def test_rule_3_when_major_version_is_unknown_names_both(folder: Path) -> None:
    _edit_config(folder, lambda q: q.update(format_version="2.0"))
    with pytest.raises(VersionError, match=r"2\.0.*1\.4"):
        open_checkpoint(folder)


def test_rule_3_when_minor_version_is_older_reads_what_it_held(folder: Path) -> None:
    """Version 1.0 knew no steps of a quantized cache."""
    _edit_config(folder, lambda q: (q.update(format_version="1.0"), q.pop("kv")))
    _edit_tensors(folder, lambda t: [t.pop(name) for name in list(t) if "mergequant_kv" in name])
    checkpoint = open_checkpoint(folder)
    checkpoint.validate()
    assert checkpoint.quantization.kv is None
    assert checkpoint.kv_module is None
    assert checkpoint.quantization.to_dict()["format_version"] == "1.0"


def test_rule_3_when_minor_version_is_1_3_reads_plain_keys(folder: Path) -> None:
    """Version 1.3 knew no rotated keys."""
    _edit_config(folder, lambda q: q.update(format_version="1.3"))
    checkpoint = open_checkpoint(folder)
    checkpoint.validate()
    assert checkpoint.quantization.kv is not None
    assert checkpoint.quantization.kv.key_rotation == ""


@pytest.mark.parametrize("version", [None, 1.0, "1", "one.two", "1.0\n"])
def test_rule_3_when_version_is_no_version_refuses(version: Any, folder: Path) -> None:
    _edit_config(folder, lambda q: q.update(format_version=version))
    _refused(folder, "MAJOR.MINOR")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda q: q.pop("recipe"), "'recipe' is missing"),
        (lambda q: q.update(extra=1), "unknown key 'extra'"),
        (lambda q: q.update(figures=[]), "figures: expected an object"),
        (lambda q: q.update(layers={}), "layers is empty"),
        (lambda q: q["layers"][QKV].update(speed=1), "q_proj: unknown key 'speed'"),
        (lambda q: q["layers"][QKV].pop("outputs"), "q_proj: key 'outputs' is missing"),
        (lambda q: q["layers"][QKV].update(outputs="10"), "q_proj.outputs: expected int"),
        (lambda q: q["prefix"].update(tokens=[-1]), "prefix.tokens"),
        (lambda q: q["kv"].update(bits=4), "kv: unknown key 'bits'"),
        (lambda q: q["kv"].update(kv_heads=0), "kv: a quantized cache needs"),
    ],
)
def test_rule_4_when_config_keys_are_wrong_names_the_key(change: Any, match: str, folder: Path) -> None:
    _edit_config(folder, change)
    _refused(folder, match)


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", ".safetensors", 7]
)
def test_rule_5_when_shard_name_is_no_plain_name_refuses(shard: Any, sharded: Path) -> None:
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"][f"{MLP}.weight_codes"] = shard
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    _refused(sharded, "do not trust")


def test_rule_5_when_index_has_no_map_refuses(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text("{}")
    _refused(sharded, "weight_map")


def test_rule_6_when_shard_is_missing_names_it(sharded: Path) -> None:
    (sharded / "model-00002-of-00003.safetensors").unlink()
    _refused(sharded, "model-00002-of-00003")


def test_rule_6_when_shard_is_truncated_names_it(sharded: Path) -> None:
    path = sharded / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    _refused(sharded, "model-00002-of-00003.*truncated")


def test_rule_7_when_tensor_lies_twice_refuses(sharded: Path) -> None:
    extra = {f"{MLP}.weight_codes": torch.zeros(6, 12, dtype=torch.int8)}
    _edit_tensors(sharded, lambda tensors: tensors.update(extra), "model-00002-of-00003.safetensors")
    _refused(sharded, r"00002.*mlp\.weight_codes.*lie in model-00001")


def test_rule_7_when_tensor_is_not_in_the_index_refuses(sharded: Path) -> None:
    _edit_tensors(sharded, lambda tensors: tensors.update(stray=torch.ones(1)), "model-00002-of-00003.safetensors")
    _refused(sharded, "'stray', which the index says nowhere")


def test_rule_7_when_shard_lacks_a_promised_tensor_refuses(sharded: Path) -> None:
    _edit_tensors(sharded, lambda tensors: tensors.pop(f"{MLP}.weight_codes"), "model-00001-of-00003.safetensors")
    _refused(sharded, "lacks tensor.*mlp")


def test_rule_7_when_index_and_single_file_are_both_there_refuses(sharded: Path) -> None:
    save_file({"a": torch.ones(1)}, sharded / "model.safetensors")
    _refused(sharded, "has both")


def test_rule_8_when_tensors_are_missing_names_them(folder: Path) -> None:
    _edit_tensors(folder, lambda tensors: tensors.pop(f"{OUT}.input_quantizer.shift"))
    _refused(folder, r"missing tensors model\.layers\.0\.attn\.o_proj\.input_quantizer\.shift")


@pytest.mark.parametrize(
    "name", [f"{QKV}.weight", f"{QKV}.bias", f"{NORM}.shift", "model.mergequant_prefix.extra", KEYS + "16"]
)
def test_rule_8_when_a_layer_has_more_than_described_refuses(name: str, folder: Path) -> None:
    _edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(1)}))
    _refused(folder, f"{name}.*not part of its description")


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        (f"{QKV}.weight_codes", torch.zeros(10, 8, dtype=torch.uint8)),
        (f"{QKV}.weight_codes", torch.zeros(10, 7, dtype=torch.int8)),
        (f"{QKV}.weight_scale", torch.ones(10).half()),
        (f"{NORM}.multiplier", torch.ones(12)),
        (f"{NORM}.index", torch.zeros(14, dtype=torch.int64)),
        ("model.mergequant_prefix.keys", torch.ones(2, 2, 3, 3)),
        (f"{KEYS}4", torch.ones(2, 2, 4)),
        (f"{KEYS}8", torch.ones(2, 2, 3).half()),
    ],
)
def test_rule_9_when_shape_or_dtype_differs_names_both(name: str, tensor: torch.Tensor, folder: Path) -> None:
    _edit_tensors(folder, lambda tensors: tensors.update({name: tensor}))
    _refused(folder, f"{name}: is .*its description needs")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (f"{NORM}.index", 12),
        (f"{NORM}.index", -1),
        (f"{OUT}.input_quantizer.index", 10),
        (f"{SPARSE}.outliers.columns", 12),
        (f"{SPARSE}.order", 12),
    ],
)
def test_rule_10_when_gather_index_is_out_of_range_names_it(name: str, value: int, folder: Path) -> None:
    _edit_tensors(folder, lambda tensors: tensors[name].__setitem__(3, value))
    _refused(folder, f"{name}: gather index reaches .*{value}")


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        (f"{NORM}.multiplier", float("inf"), r"not finite at \(1,\)"),
        (f"{OUT}.input_quantizer.shift", float("nan"), "not finite"),
        (f"{OUT}.bias", float("nan"), "not finite"),
        (f"{QKV}.weight_scale", 0.0, r"scale at \(1,\) is not positive"),
        (f"{QKV}.weight_scale", -1.0, "not positive"),
        ("model.mergequant_prefix.hidden", float("nan"), "not finite"),
        (f"{KEYS}8", float("inf"), "not finite"),
        (f"{KEYS}4", 0.0, r"scale at \(1, 0, 0\) is not positive"),
        ("model.mergequant_kv.value_scale_4", -1.0, "not positive"),
        (f"{TWO}.group_scale", 0, r"reaches 0\.\..*outside 1\.\.16"),
        (f"{TWO}.group_scale", 17, r"\.\.17, outside"),
        (f"{TWO}.group_zero", -9, r"reaches -9\.\..*outside -8\.\.7"),
        (f"{TWO}.group_zero", 8, r"\.\.8, outside"),
        (f"{SPARSE}.statistics", float("inf"), "not finite"),
        (f"{SPARSE}.outliers.values", float("nan"), "not finite"),
    ],
)
def test_rule_11_when_values_make_no_sense_names_the_place(name: str, value: float, match: str, folder: Path) -> None:
    _edit_tensors(folder, lambda tensors: tensors[name].__setitem__(1, value))
    _refused(folder, f"{name}.*{match}")


@pytest.mark.parametrize(
    ("name", "tensor", "match"),
    [
        (f"{BOOKS}.indices_0", torch.zeros(1, dtype=torch.int32), "its description needs"),
        (f"{BOOKS}.book_1", torch.zeros(8, 4, 1), "its description needs"),
        (f"{BOOKS}.book_0", torch.full((1, 12, 2), float("nan")).half(), "not finite"),
        (f"{BOOKS}.order", torch.zeros(12, dtype=torch.int16), "names a column twice"),
        (f"{BOOKS}.order", torch.arange(1, 13).to(torch.int16), r"reaches 1\.\.12"),
        (f"{BOOKS}.outliers.columns", torch.full((5,), 12, dtype=torch.int16), r"12\.\.12"),
        (f"{BOOKS}.outliers.pointers", torch.zeros(7, dtype=torch.int32), "end at 5"),
    ],
)
def test_rules_9_to_11_when_codebooks_are_wrong_refuses(
    name: str, tensor: torch.Tensor, match: str, folder: Path
) -> None:
    _edit_tensors(folder, lambda tensors: tensors.update({name: tensor}))
    _refused(folder, f"{name}.*{match}")


def test_rule_12_when_no_norm_emits_the_codes_refuses(folder: Path) -> None:
    _edit_config(folder, lambda q: q["layers"][NORM].update(bits=4))
    _refused(folder, "attn.q_proj: reads 14 codes of 8 bits")


def test_rule_13_when_prefix_is_described_and_not_stored_refuses(folder: Path) -> None:
    _edit_tensors(folder, lambda t: [t.pop(name) for name in list(t) if "mergequant_prefix" in name])
    _refused(folder, "one prefix, stored are")


def test_rule_13_when_prefix_is_stored_and_not_described_refuses(folder: Path) -> None:
    _edit_config(folder, lambda q: q.pop("prefix"))
    _refused(folder, "no prefix, stored are")


def test_rule_14_when_rotation_is_another_names_layer_and_both(folder: Path) -> None:
    _edit_config(folder, lambda q: q["layers"][MLP]["input"].update(rotation="cosine-12 x sylvester-1"))
    _refused(folder, f"{MLP}: .*cosine-12")


def test_rule_14_when_rotation_of_keys_is_another_names_module_and_both(folder: Path) -> None:
    _edit_config(folder, lambda q: q["kv"].update(key_rotation=ops.rotation(3).name))
    open_checkpoint(folder).validate()
    _edit_config(folder, lambda q: q["kv"].update(key_rotation="paley1-12 x sylvester-1"))
    _refused(folder, "model.mergequant_kv: .*paley1-12.*cosine-3")


def test_rule_15_when_cache_steps_are_described_and_not_stored_refuses(folder: Path) -> None:
    _edit_tensors(folder, lambda t: [t.pop(name) for name in list(t) if "mergequant_kv" in name])
    _refused(folder, "one set of cache steps, stored are")


def test_rule_15_when_cache_steps_are_stored_and_not_described_refuses(folder: Path) -> None:
    _edit_config(folder, lambda q: q.pop("kv"))
    _refused(folder, "no set of cache steps, stored are")


@pytest.mark.parametrize("module", ["mergequant_kv", "model.decoder.mergequant_kv"])
def test_rule_15_when_cache_steps_lie_elsewhere_than_the_prefix_refuses(module: str, folder: Path) -> None:
    def move(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "mergequant_kv" in name]:
            tensors[f"{module}.{name.rpartition('.')[2]}"] = tensors.pop(name)

    _edit_tensors(folder, move)
    _refused(folder, "lies in another module than model.mergequant_prefix")


def test_rule_15_when_cache_steps_are_stored_twice_refuses(folder: Path) -> None:
    _edit_tensors(folder, lambda t: t.update({"model.decoder.mergequant_kv.key_scale_4": torch.ones(2, 2, 3)}))
    _refused(folder, "one set of cache steps, stored are.*decoder")


@pytest.mark.parametrize("key", ["layers", "kv_heads", "key_width", "value_width"])
def test_rule_15_when_cache_steps_and_prefix_differ_in_shape_refuses(key: str, folder: Path) -> None:
    _edit_config(folder, lambda q: q["kv"].update({key: 5}))
    _refused(folder, "model.mergequant_kv: steps for keys and values of shape .*the prefix has")


def test_tensors_when_prefix_is_given_gives_only_those(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.tensors(f"{MLP}.")) == {
        f"{MLP}.input_quantizer.multiplier",
        f"{MLP}.weight_codes",
        f"{MLP}.weight_scale",
    }
    with pytest.raises(CheckpointError, match="no tensor 'x'"):
        checkpoint.get("x")


def test_expected_tensors_when_called_first_does_not_poison_rotations() -> None:
    ops.rotation.cache_clear()
    width = 20
    source = InputSpec(kind="static", in_width=width, width=width, rotation=ops.rotation(width).name)
    ops.rotation.cache_clear()
    expected_tensors("layer", LinearSpec(outputs=3, input=source))
    assert ops.rotation(width).left.device.type == "cpu"


def test_count_bits_when_figures_are_absent_counts_by_hand(folder: Path) -> None:
    counted = count_bits(folder)
    assert counted["bytes"] == (folder / "model.safetensors").stat().st_size
    assert counted["linear_parameters"] == 2 * (10 * 12 + 12 * 10 + 12 + 4 * 6 * 12)
    assert counted["parameters"] == counted["linear_parameters"] + 2 * (12 + 15) + 7 * 12
    beside = [t for name, t in load_file(folder / "model.safetensors").items() if ".mergequant_" in name]
    payload = sum(tensor.numel() * tensor.element_size() for tensor in beside)
    assert payload < counted["auxiliary_bytes"] < counted["bytes"] - counted["linear_bytes"]
    inside = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in load_file(folder / "model.safetensors").items()
        if "layers" in name and "kept" not in name
    )
    assert inside < counted["linear_bytes"] < counted["bytes"]
    assert counted["bits_per_parameter"] == pytest.approx(8 * counted["bytes"] / counted["parameters"])


def test_count_bits_when_figures_are_given_divides_by_them(folder: Path) -> None:
    _edit_config(folder, lambda q: q["figures"].update(parameters=1000, linear_parameters=500))
    counted = count_bits(folder)
    assert counted["bits_per_parameter"] == pytest.approx(counted["bytes"] * 8 / 1000)
    assert counted["linear_bits_per_parameter"] == pytest.approx(counted["linear_bytes"] * 8 / 500, rel=1e-3)


def test_model_card_when_written_names_recipe_results_and_prefix(folder: Path) -> None:
    rows = {"float": {"perplexity": 7.12345}, "quantized": {"perplexity": 7.5, "a|b": 1}}
    text = model_card("tiny-w4a8", open_checkpoint(folder).quantization, base="tiny", results=rows)
    assert text.startswith("---\nlibrary_name: transformers\n")
    for part in (
        "# tiny-w4a8",
        "`by-hand`",
        "| float | 7.123 |  |",
        "a\\|b",
        "2 stored prefix token(s)",
        "8 or 4 bits",
        "base_model: tiny",
    ):
        assert part in text


def test_rule_10_when_columns_have_16_bits_reads_the_upper_half_as_positive(folder: Path) -> None:
    _edit_tensors(folder, lambda tensors: tensors[f"{SPARSE}.outliers.columns"].__setitem__(0, -1))
    _refused(folder, r"outliers\.columns: gather index reaches .*65535")


@pytest.mark.parametrize("pointers", [[1, 1, 2, 2, 3, 3, 5], [0, 2, 1, 2, 3, 3, 5], [0, 0, 2, 2, 3, 3, 6], [0] * 7])
def test_rule_16_when_rows_of_outliers_make_no_sense_refuses(pointers: list[int], folder: Path) -> None:
    made = torch.tensor(pointers, dtype=torch.int32)
    _edit_tensors(folder, lambda tensors: tensors.update({f"{SPARSE}.outliers.pointers": made}))
    _refused(folder, f"{SPARSE}.*must begin at 0, never fall and end at 5")
