"""Each method wins where its paper says, on models with a planted structure, and not where nothing is planted.

Models, recipes and claims are those of benchmarks/planted.py, whose table is in docs/results.md; fewer windows here.
"""

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import PreTrainedModel

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
Found = Mapping[tuple[str, str], list[float]]


def _load() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module("planted")


planted = _load()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Mapping[str, str]]:
    return planted.measure(tmp_path_factory.mktemp("planted"), 1, 12, 6)  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("text", [claim.text for claim in planted.CLAIMS if not claim.why])
def test_claim_holds(found: tuple[Found, Mapping[str, str]], text: str) -> None:
    (claim,) = (claim for claim in planted.CLAIMS if claim.text == text)
    holds = claim.holds(found[0])
    if holds is None:
        pytest.skip(f"not measured: {found[1]}")
    left, right = found[0][claim.structure, claim.left], found[0][claim.other or claim.structure, claim.right]
    assert holds, (left, right, claim.factor)


def _logits(model: PreTrainedModel) -> torch.Tensor:
    tokens = torch.randint(300, 8000, (2, 24), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = planted.BOS
    with torch.no_grad():
        logits: torch.Tensor = model.double()(tokens).logits
    return logits


def test_pairs_keep_the_function_and_others_change_it() -> None:
    plain = _logits(planted.llama())
    torch.testing.assert_close(_logits(planted.paired()), plain, rtol=1e-4, atol=1e-4)
    assert float((_logits(planted.strong()) - plain).abs().max()) > 0.1


def test_only_bos_has_the_massive_activation() -> None:
    model = planted.massive()
    inputs: list[torch.Tensor] = []
    mlp = model.model.layers[0].mlp
    mlp.down_proj.register_forward_pre_hook(lambda _module, args: inputs.append(args[0].detach()))
    _logits(model)
    largest = inputs[0].abs().amax(-1)
    assert 30 < float(largest[:, 0].min() / largest[:, 1:].max()) < 80


def test_claims_and_recipes_name_what_there_is() -> None:
    for claim in planted.CLAIMS:
        for structure, label in ((claim.structure, claim.left), (claim.other or claim.structure, claim.right)):
            assert structure in planted.RECIPES[label][2], claim.text
    assert {name for _, _, names in planted.RECIPES.values() for name in names} == set(planted.STRUCTURES)
