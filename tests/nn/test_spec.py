"""Descriptions of layers: JSON and back, and nothing else taken."""

import json
from typing import Any

import pytest

from mergequant.errors import CheckpointError
from mergequant.nn import (
    InputSpec,
    KVSpec,
    LinearSpec,
    NormSpec,
    PrefixSpec,
    QuantLinear,
    QuantNorm,
    Spec,
    build_module,
    spec_from_dict,
)
from mergequant.ops import rotation

CODES = InputSpec("codes", 40, 40, 4)
SPECS: list[Spec] = [
    LinearSpec(8, CODES),
    LinearSpec(8, CODES, weight_bits=8, bias=True),
    LinearSpec(8, InputSpec("static", 40, 44, 4, per_channel=True, gathers=True, shifts=True)),
    LinearSpec(8, InputSpec("static", 40, 40, 8, rotation(40).name)),
    LinearSpec(8, InputSpec("dynamic", 40, 40, 4, clip_ratio=0.75)),
    LinearSpec(8, InputSpec("dynamic", 40, 44, 4, gathers=True, merges=(3, 3, 1))),
    LinearSpec(8, InputSpec("dynamic", 40, 40, 4, per_channel=True, shifts=True)),
    LinearSpec(8, InputSpec("float", 40, 40, per_channel=True)),
    LinearSpec(8, InputSpec("dynamic", 40, 40, 4, left=5, right=8)),
    LinearSpec(8, InputSpec("dynamic", 40, 40, 4, left=4)),
    LinearSpec(8, InputSpec("float", 40, 40), weight_bits=3, group_size=10),
    LinearSpec(8, InputSpec("codes", 41, 41), weight_bits=5),
    NormSpec("rms", 40, 40, 4, 1e-6),
    NormSpec("layer", 40, 44, 8, 0.0, gathers=True, shifts=True),
    NormSpec("rms", 40, 40, 16, 1e-6, shifts=True),
    KVSpec(2, 2, 12, 8, rotation(12).name),
    KVSpec(2, 2, 16, 8),
    PrefixSpec((1, 7), True, 2, 2, 16, 8, 40),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_from_dict_when_written_by_to_dict_expect_the_same_spec(spec: Spec) -> None:
    data = json.loads(json.dumps(spec.to_dict()))
    assert type(spec).from_dict(data, "here") == spec
    if isinstance(spec, (LinearSpec, NormSpec)):
        assert spec_from_dict(data, "here") == spec
        module = build_module(spec)
        assert isinstance(module, QuantNorm if isinstance(spec, NormSpec) else QuantLinear)
        assert module.spec == spec


def test_to_dict_when_fields_hold_their_default_expect_them_left_out() -> None:
    data = LinearSpec(8, CODES).to_dict()
    assert data == {"outputs": 8, "input": {"kind": "codes", "in_width": 40, "width": 40, "bits": 4}}


LINEAR: dict[str, Any] = {"outputs": 8, "input": {"kind": "static", "in_width": 40, "width": 40}}
NORM: dict[str, Any] = {"norm": "rms", "channels": 40, "width": 40, "bits": 4, "eps": 1e-6}
PREFIX: dict[str, Any] = SPECS[-1].to_dict()
KV: dict[str, Any] = SPECS[-2].to_dict()
GATHERED = {"kind": "dynamic", "in_width": 40, "width": 44, "gathers": True}
HOSTILE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (LINEAR, {"outputs": 0}, "outputs"),
    (LINEAR, {"outputs": -1}, "outputs"),
    (LINEAR, {"outputs": True}, "outputs"),
    (LINEAR, {"outputs": 8.0}, "outputs"),
    (LINEAR, {"outputs": "8"}, "outputs"),
    (LINEAR, {"outputs": None}, "outputs"),
    (LINEAR, {"bias": 1}, "bias"),
    (LINEAR, {"weight_bits": 1}, "weight_bits"),
    (LINEAR, {"weight_bits": 16}, "weight_bits"),
    (LINEAR, {"group_size": 8}, "groups"),
    (LINEAR, {"input": {"kind": "float", "in_width": 40, "width": 40}, "group_size": 7}, "group_size"),
    (LINEAR, {"input": {"kind": "float", "in_width": 40, "width": 40}, "group_size": -8}, "group_size"),
    (LINEAR, {"input": {"kind": "float", "in_width": 41, "width": 41}}, "41 columns"),
    (LINEAR, {"input": []}, "input"),
    (LINEAR, {"input": {"in_width": 40, "width": 40}}, "kind"),
    (LINEAR, {"input": {"kind": "lazy", "in_width": 40, "width": 40}}, "lazy"),
    (LINEAR, {"input": {"kind": ["static"], "in_width": 40, "width": 40}}, "static"),
    (LINEAR, {"input": {"kind": "static", "in_width": 40, "width": 44}}, "gather"),
    (LINEAR, {"input": {"kind": "static", "in_width": 0, "width": 0}}, "widths"),
    (LINEAR, {"input": {"kind": "static", "in_width": 40, "width": 40, "bits": 9}}, "bits"),
    (LINEAR, {"input": {"kind": "dynamic", "in_width": 40, "width": 44}}, "gather"),
    (LINEAR, {"input": {"kind": "float", "in_width": 40, "width": 44, "gathers": True}}, "static or dynamic"),
    (LINEAR, {"input": {**GATHERED, "in_width": 44, "rotation": rotation(44).name}}, "transformed"),
    (LINEAR, {"input": {**GATHERED, "merges": [3, 4]}}, "not increase"),
    (LINEAR, {"input": {**GATHERED, "merges": [45]}}, "not increase"),
    (LINEAR, {"input": {**GATHERED, "merges": [2, 0]}}, "positive"),
    (LINEAR, {"input": {**GATHERED, "merges": [-1]}}, "whole numbers"),
    (LINEAR, {"input": {**GATHERED, "gathers": False, "in_width": 44, "merges": [1]}}, "merges"),
    (LINEAR, {"input": {**GATHERED, "kind": "static", "merges": [1]}}, "merges"),
    (LINEAR, {"input": {"kind": "dynamic", "in_width": 40, "width": 40, "shifts": True}}, "per_channel"),
    (LINEAR, {"input": {"kind": "codes", "in_width": 40, "width": 40, "per_channel": True}}, "floats"),
    (LINEAR, {"input": {"kind": "codes", "in_width": 40, "width": 40, "rotation": rotation(40).name}}, "rotated"),
    (LINEAR, {"input": {"kind": "dynamic", "in_width": 40, "width": 40, "clip_ratio": 0}}, "clip_ratio"),
    (LINEAR, {"input": {"kind": "dynamic", "in_width": 40, "width": 40, "clip_ratio": float("nan")}}, "clip_ratio"),
    (LINEAR, {"input": {"kind": "dynamic", "in_width": 40, "width": 40, "clip_ratio": 10**400}}, "clip_ratio"),
    (LINEAR, {"module": "os.system"}, "module"),
    (NORM, {"norm": "batch"}, "batch"),
    (NORM, {"eps": -1e-6}, "eps"),
    (NORM, {"eps": float("nan")}, "eps"),
    (NORM, {"eps": float("inf")}, "eps"),
    (NORM, {"eps": 10**400}, "eps"),
    (NORM, {"eps": "0"}, "eps"),
    (NORM, {"width": 44}, "gather"),
    (NORM, {"channels": 0}, "widths"),
    (NORM, {"bits": 1}, "bits"),
    (NORM, {"bits": 16, "gathers": True}, "gathers no channels"),
    (NORM, {"outputs": 3}, "outputs"),
    (PREFIX, {"tokens": []}, "tokens"),
    (PREFIX, {"tokens": [1, -2]}, "tokens"),
    (PREFIX, {"tokens": [1, True]}, "tokens"),
    (PREFIX, {"tokens": "12"}, "tokens"),
    (PREFIX, {"layers": 0}, "layers"),
    (PREFIX, {"replaces_bos": 1}, "replaces_bos"),
    (KV, {"layers": 0}, "layers"),
    (KV, {"value_width": -4}, "widths"),
    (KV, {"kv_heads": True}, "kv_heads"),
    (KV, {"bits": 4}, "bits"),
    (KV, {"key_rotation": True}, "key_rotation"),
]


@pytest.mark.parametrize(("base", "change", "word"), HOSTILE)
def test_from_dict_when_hostile_expect_error_that_names_place_and_key(
    base: dict[str, Any], change: dict[str, Any], word: str
) -> None:
    def build(data: dict[str, Any]) -> Spec:
        kind = {id(PREFIX): PrefixSpec, id(KV): KVSpec}.get(id(base))
        return spec_from_dict(data, "blocks.3") if kind is None else kind.from_dict(data, "blocks.3")

    build(base)  # right before it is spoilt
    with pytest.raises(CheckpointError, match=word) as caught:
        build({**base, **change})
    assert "blocks.3" in str(caught.value)


@pytest.mark.parametrize("base", [LINEAR, NORM, PREFIX, KV])
def test_from_dict_when_a_key_is_missing_expect_error_that_names_it(base: dict[str, Any]) -> None:
    kind = {id(PREFIX): PrefixSpec, id(KV): KVSpec, id(NORM): NormSpec}.get(id(base), LinearSpec)
    for key in base:
        with pytest.raises(CheckpointError, match=f"'{key}' is missing"):
            kind.from_dict({k: v for k, v in base.items() if k != key}, "here")


@pytest.mark.parametrize("data", [None, [], "LinearSpec", 3])
def test_from_dict_when_not_an_object_expect_error(data: Any) -> None:
    with pytest.raises(CheckpointError, match="expected an object"):
        spec_from_dict(data, "here")
