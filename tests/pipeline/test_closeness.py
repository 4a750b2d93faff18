"""With 8 bits everywhere little is lost, on every family: nothing is scaled, gathered, rotated or prefixed wrongly."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mergequant
from families import FAMILIES, make_model
from mergequant.calibration import BlockContext
from mergequant.pipeline import Quantized

EIGHT = {"weight_bits": 8, "activation_bits": 8, "other_bits": 8, "clip": "none", "stagger": True, "width": "keep"}
OTHERS: dict[str, dict[str, Any]] = {
    "dynamic": {"other": "dynamic"},
    "static": {"other": "static", "other_split": 0.2, "prefix": "bos"},
    "hadamard-static": {"other": "hadamard-static", "prefix": (1, 9)},
}
SAMPLES, HELD_OUT = 60, 8
LARGEST = 0.045  # relative error of the logits; plain W8A8 with token scales has up to 0.03 on these models


def error(family: str, other: str, run: Callable[..., Quantized], windows: Callable[..., Tensor]) -> float:
    """Relative error of the logits against the float model, which sees the prefix as tokens."""
    model = make_model(family)
    tokens = windows(model, SAMPLES + HELD_OUT)
    made = run(model, "mergequant", settings={**EIGHT, **OTHERS[other]}, data=tokens, samples=SAMPLES)
    loaded = mergequant.load(made.folder)
    prefix = OTHERS[other].get("prefix")
    longer = tokens
    if isinstance(prefix, tuple):
        bos = torch.full((len(tokens), 1), 1)
        rest = tokens if tokens[0, 0] != prefix[0] else tokens[:, 1:]
        longer = torch.cat([bos, torch.full_like(bos, prefix[1]), rest], 1)
    with torch.no_grad():
        exact, found = model(longer).logits, loaded(tokens).logits
    last = tokens.shape[1] - 1
    return float((found[:, -last:] - exact[:, -last:]).norm() / exact[:, -last:].norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("other", OTHERS)
def test_eight_bits_on_family_stay_near_the_float_model(
    other: str, family: str, run: Callable[..., Quantized], windows: Callable[..., Tensor]
) -> None:
    assert error(family, other, run, windows) < LARGEST


def test_error_when_prefix_values_are_not_scaled_is_large(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., Quantized], windows: Callable[..., Tensor]
) -> None:
    """The measure sees the mistake that is easiest to make."""
    monkeypatch.setattr(BlockContext, "absorb_in_prefix", lambda self, factor: None)
    assert error("llama", "static", run, windows) > 2 * LARGEST
