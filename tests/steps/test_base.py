"""The register of steps, and steps from and to plain data."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import yaml

from mergequant.calibration import SiteContext
from mergequant.errors import RecipeError
from mergequant.steps import (
    AdaptiveRound,
    AllocateBits,
    Clip,
    ClipWeights,
    Compensate,
    Flatten,
    LearnRotations,
    LearnRounding,
    LowRank,
    MixHeads,
    PowerRound,
    Prune,
    Ranges,
    Reassemble,
    Reorder,
    Rotate,
    RotateKeys,
    RotateResidual,
    Round,
    RoundChannels,
    RoundHalfQuadratic,
    RoundLearned,
    RoundMinMax,
    RoundSparse,
    RoundVectors,
    ScaleChannels,
    SearchExponent,
    ShiftChannels,
    SiteStep,
    SmoothAttention,
    Split,
    Step,
    TensorInput,
    TokenInput,
    TuneBlock,
    WeightGradients,
    base,
    step_from_dict,
)

STEPS: list[Step] = [
    Ranges(("norm",), 8, 0.99),
    Split(("norm",), (0.0, 0.25), 64, "step", True, True, 8),
    Clip(mode="activation", lambdas=(0.0, 1.0), rounding="rtn"),
    Prune(("mlp_output", "norm")),
    Compensate(ridge=0.5),
    LowRank(rank=2, epochs=3),
    Rotate(("attention_output",)),
    RotateResidual(heads=False),
    RotateKeys(),
    TokenInput(search=False, clip_ratio=0.9),
    TensorInput(bits=8),
    Round(method="rtn", bits=3, group_size=8, clip=False),
    ScaleChannels(("norm",), "threshold", (1.0, 0.5), 4, 32, 8, 2, "tensor"),
    ShiftChannels(("norm",), "mean", "biased", 0.1, 1),
    ClipWeights(weight_bits=3, group_size=8, steps=4),
    SmoothAttention(alpha=0.75, tokens=64),
    Reorder(),
    MixHeads(("attention_output",)),
    Flatten(weight_bits=3, scale=False, epochs=2, chunks=4),
    LearnRotations(heads=False, steps=3),
    Reassemble(("norm",), 6, expansion=0.1, tried=4),
    TuneBlock(weight_bits=3, epochs=1),
    AdaptiveRound(axis="row", group_size=8),
    AllocateBits(3.5, (2, 4)),
    WeightGradients(share=0.02, samples=2),
    RoundSparse(threshold=0.5, tile=8),
    RoundVectors(vector=4, bits=8),
    RoundChannels(average_bits=2.5),
    RoundHalfQuadratic(group_size=8, iterations=3),
    RoundLearned(bits=3),
    LearnRounding(bits=3, epochs=1),
    RoundMinMax(moves="swap_and_single"),
    SearchExponent(bits=3),
    PowerRound(exponent=0.7),
]


def test_register_when_listed_expect_every_step_of_the_package_tried_here() -> None:
    own = {name for name, cls in base._STEPS.items() if cls.__module__.startswith("mergequant.")}
    assert own == {step.name for step in STEPS}


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_step_from_dict_when_written_by_to_dict_expect_the_same_step(step: Step) -> None:
    data = step.to_dict()
    assert step_from_dict(data, "here") == step
    assert step_from_dict(json.loads(json.dumps(data)), "here") == step
    assert step_from_dict(yaml.safe_load(yaml.safe_dump(data)), "here") == step
    assert set(data) == {"step", *(field.name for field in dataclasses.fields(step))}


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_step_from_dict_when_only_named_expect_defaults(step: Step) -> None:
    assert step_from_dict({"step": step.name}, "here") == type(step)()


WRONG: list[tuple[Any, str]] = [
    (None, "mapping"),
    ("round", "mapping"),
    ({}, "mapping"),
    ({"step": 3}, "mapping"),
    ({"step": "rond"}, "did you mean 'round'"),
    ({"step": "clipp"}, "did you mean 'clip'"),
    ({"step": "zzzz"}, "known are adaptive_round, allocate_bits, clip, "),
    ({"step": "round", "method_": "rtn"}, "did you mean 'method'"),
    ({"step": "round", 3: "rtn"}, "no parameter 3"),
    ({"step": "round", "name": "x"}, "no parameter 'name'"),
    ({"step": "round", "bits": "four"}, "round.bits.*'four' does not fit; allowed: int"),
    ({"step": "round", "bits": 4.0}, "does not fit"),
    ({"step": "round", "bits": True}, "does not fit"),
    ({"step": "round", "bits": None}, "does not fit"),
    ({"step": "round", "clip": 1}, "allowed: bool"),
    ({"step": "round", "damping": "0.1"}, "allowed: float"),
    ({"step": "round", "damping": float("nan")}, "does not fit"),
    ({"step": "round", "damping": float("inf")}, "does not fit"),
    ({"step": "round", "method": "GPTQ"}, "'gptq', 'rtn'"),
    ({"step": "round", "sites": "norm"}, "a list of"),
    ({"step": "round", "sites": 3}, "a list of"),
    ({"step": "round", "sites": ["nrom"]}, "'norm' or 'stream' or 'attention_output'"),
    ({"step": "split", "budgets": 0.05}, "a list of float"),
    ({"step": "split", "budgets": ["a"]}, "a list of float"),
    ({"step": "split", "budgets": []}, "budgets"),
    ({"step": "split", "budgets": [1.5]}, "budgets"),
    ({"step": "clip", "lambdas": []}, "lambdas"),
    ({"step": "clip", "mode": "jiont"}, "'joint'"),
    ({"step": "ranges", "quantile": 0}, "quantile"),
    ({"step": "token_input", "clip_ratio": 0.0}, "clip_ratio"),
    ({"step": "compensate", "ridge": 0}, "ridge"),
    ({"step": "low_rank", "rank": 0}, "rank"),
    ({"step": "scale_channels", "exponents": []}, "exponents"),
    ({"step": "scale_channels", "exponents": [1.5]}, "between 0 and 1"),
    ({"step": "scale_channels", "chunks": 0}, "chunks"),
    ({"step": "scale_channels", "rule": "awq"}, "'smooth', 'aware'"),
    ({"step": "clip_weights", "least": 0}, "least"),
    ({"step": "clip_weights", "steps": 0}, "steps"),
]


@pytest.mark.parametrize(("data", "words"), WRONG)
def test_step_from_dict_when_wrong_expect_error_that_says_what_would_fit(data: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        step_from_dict(data, "recipe x, step 2")


def test_step_from_dict_when_whole_numbers_stand_for_floats_expect_floats() -> None:
    step = step_from_dict({"step": "split", "budgets": [0, 1]}, "here")
    assert isinstance(step, Split)
    assert [type(budget) for budget in step.budgets] == [float, float]


def test_register_when_a_name_is_taken_expect_error_that_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_STEPS", dict(base._STEPS))
    with pytest.raises(RecipeError, match=r"'round' is taken by mergequant\.steps\.rounding\.Round"):

        class Other(SiteStep):
            name: ClassVar[str] = "round"

            def run(self, context: SiteContext) -> None:
                """Nothing."""

    assert base._STEPS["round"] is Round


def test_register_when_another_module_has_a_class_of_the_same_name_expect_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(base, "_STEPS", dict(base._STEPS))
    namespace = {"name": "round", "run": lambda self, context: None, "__qualname__": "Round"}
    with pytest.raises(RecipeError, match="is taken by"):
        type("Round", (SiteStep,), {**namespace, "__module__": "elsewhere"})
    again = type("Round", (SiteStep,), {**namespace, "__module__": "mergequant.steps.rounding"})  # a reload
    assert base._STEPS["round"] is again


def test_register_when_a_new_step_is_defined_expect_it_known_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_STEPS", dict(base._STEPS))

    @dataclass(frozen=True)
    class Halve(SiteStep):
        name: ClassVar[str] = "halve"
        times: int = 1

        def run(self, context: SiteContext) -> None:
            """Nothing."""

    assert step_from_dict({"step": "halve", "times": 2, "sites": ["norm"]}, "here") == Halve(("norm",), 2)
