import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergequant.errors import WeightsError
from mergequant.models.weights import SafetensorsSource, StateDictSource

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_file({"a": TENSORS["a"]}, tmp_path / "one.safetensors")
    save_file({"b": TENSORS["b"]}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    return tmp_path


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_source_whatever_the_layout_gives_what_was_saved(layout: str, request: pytest.FixtureRequest) -> None:
    source = SafetensorsSource(request.getfixturevalue(layout))
    assert source.names() == {"a", "b"}
    for name, tensor in TENSORS.items():
        assert torch.equal(source.get(name), tensor)
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == tensor.dtype == source.get(name).dtype


def test_source_for_an_unknown_name_says_so(single: Path) -> None:
    with pytest.raises(WeightsError, match="no tensor named 'c'"):
        SafetensorsSource(single).get("c")


def test_source_with_a_missing_shard_names_it(sharded: Path) -> None:
    (sharded / "two.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"two\.safetensors is missing"):
        SafetensorsSource(sharded)


@pytest.mark.parametrize("keep", [0, 5, 60, -3])
def test_source_with_a_truncated_file_names_it(single: Path, keep: int) -> None:
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=r"model\.safetensors is truncated or corrupt"):
        SafetensorsSource(single)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        json.dumps({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 99]}}).encode(),
        json.dumps({"a": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 24]}}).encode(),
    ],
)
def test_source_with_a_corrupt_header_names_the_file(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))
    with pytest.raises(WeightsError, match=r"model\.safetensors is truncated or corrupt"):
        SafetensorsSource(tmp_path)


def test_source_with_a_huge_header_length_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    with pytest.raises(WeightsError, match="truncated or corrupt"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("trick", ["../one.safetensors", "/etc/passwd", "..\\one.safetensors", "sub/../../x", ""])
def test_index_that_points_outside_the_folder_is_refused(sharded: Path, trick: str) -> None:
    write_index(sharded, {"a": trick})
    with pytest.raises(WeightsError, match="may point outside"):
        SafetensorsSource(sharded)


def test_link_that_leads_outside_the_folder_is_refused(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "two.safetensors"
    (sharded / "two.safetensors").rename(elsewhere)
    (sharded / "two.safetensors").symlink_to(elsewhere)
    with pytest.raises(WeightsError, match="link to"):
        SafetensorsSource(sharded)


def test_link_of_a_hub_cache_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    save_file(TENSORS, tmp_path / "blobs" / "f00d")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/f00d"))
    assert SafetensorsSource(snapshot).names() == {"a", "b"}


def test_index_that_names_a_tensor_its_shard_lacks_is_refused(sharded: Path) -> None:
    write_index(sharded, {"a": "one.safetensors", "b": "one.safetensors"})
    with pytest.raises(WeightsError, match=r"one\.safetensors holds 'b'"):
        SafetensorsSource(sharded)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "{}"])
def test_index_that_is_none_is_refused(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightsError, match=r"index\.json"):
        SafetensorsSource(sharded)


def test_folder_with_pickles_only_asks_for_safetensors(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match="as safetensors"):
        SafetensorsSource(tmp_path)


def test_folder_without_weights_says_so(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="holds neither"):
        SafetensorsSource(tmp_path)


def test_fingerprint_when_one_weight_or_the_config_changes_differs(single: Path) -> None:
    (single / "config.json").write_text("{}")
    before = SafetensorsSource(single).fingerprint()
    assert before == SafetensorsSource(single).fingerprint()
    (single / "config.json").write_text("[]")
    config_changed = SafetensorsSource(single).fingerprint()
    save_file({**TENSORS, "a": TENSORS["a"] + 1}, single / "model.safetensors")
    assert len({before, config_changed, SafetensorsSource(single).fingerprint()}) == 3


def test_fingerprint_of_large_files_reads_both_ends(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergequant.models.weights.HASH_ALL_BELOW", 0)
    monkeypatch.setattr("mergequant.models.weights.EDGE", 4)
    before = SafetensorsSource(single).fingerprint()
    data = bytearray((single / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (single / "model.safetensors").write_bytes(bytes(data))
    assert SafetensorsSource(single).fingerprint() != before


def test_state_dict_source_gives_the_tensors_and_a_fingerprint_of_values() -> None:
    source = StateDictSource(TENSORS)
    assert source.names() == {"a", "b"}
    assert torch.equal(source.get("a"), TENSORS["a"])
    assert source.dtype("b") == torch.bfloat16
    assert source.fingerprint() == StateDictSource(dict(TENSORS)).fingerprint()
    assert source.fingerprint() != StateDictSource({**TENSORS, "a": TENSORS["a"] + 1}).fingerprint()
    assert source.fingerprint() != StateDictSource(TENSORS, "config").fingerprint()


def test_state_dict_source_with_meta_tensors_is_refused() -> None:
    with pytest.raises(WeightsError, match="w is on the meta device"):
        StateDictSource({"w": torch.empty(2, device="meta")})
