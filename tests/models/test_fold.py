"""Queries, keys and hidden channels: found without names, exact in float64, refused where a norm stands behind them."""

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from families import FAMILIES, make_model
from mergequant.models import ModelShell, QueryKeyRows, RowSlice, find_hidden_rows, find_query_key_rows, permute_hidden
from mergequant.models.probe import relative_difference

TOLERANCE = 1e-10
NORMED = ("qwen3",)  # families that norm queries and keys


def spread(rows: QueryKeyRows, seed: int = 0) -> Tensor:
    drawn = torch.rand(rows.heads, rows.width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.exp2(6 * rows.tie(drawn) - 3)


def outputs(shell: ModelShell, change: object = None) -> tuple[Tensor, Tensor]:
    """A random block's output before and after a change."""
    block, run, hidden = shell.random_block(0, torch.Generator().manual_seed(9))
    before = run(block, hidden)
    with torch.no_grad():
        change(block)  # type: ignore[operator]
    return before, run(block, hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_query_key_rows_on_family_expect_scales_to_cancel_in_float64(family: str) -> None:
    shell = ModelShell.open(make_model(family))
    rows = find_query_key_rows(shell, 0)
    if family in NORMED:
        assert rows is None
        return
    assert rows is not None
    before, after = outputs(shell, lambda block: rows.scale(block, spread(rows)))
    assert relative_difference(after, before) < TOLERANCE
    assert find_query_key_rows(shell, 0) is rows  # searched once


@pytest.mark.parametrize("family", ["llama", "llama_no_gqa", "phi3"])
def test_query_key_rows_when_keys_and_queries_are_told_apart_expect_the_names_that_a_reader_knows(family: str) -> None:
    rows = find_query_key_rows(ModelShell.open(make_model(family)), 0)
    assert rows is not None
    if family == "phi3":
        assert rows.queries == (RowSlice("self_attn.qkv_proj", 0, 40),)
        assert rows.keys == RowSlice("self_attn.qkv_proj", 40, 60)
    else:
        assert [part.linear for part in rows.queries] == ["self_attn.q_proj"]
        assert rows.keys.linear == "self_attn.k_proj"
    assert rows.pairing == "halves"


@pytest.mark.parametrize(
    "wrong", [{"pairing": "neighbours"}, {"pairing": "none"}, {"heads": 1, "width": 20}], ids=["pairs", "free", "heads"]
)
def test_scale_when_rows_are_misread_expect_the_measure_to_see_it(wrong: dict[str, object]) -> None:
    shell = ModelShell.open(make_model("llama"))
    rows = find_query_key_rows(shell, 0)
    assert rows is not None
    misread = dataclasses.replace(rows, **wrong)  # type: ignore[arg-type]
    before, after = outputs(shell, lambda block: misread.scale(block, spread(misread)))
    assert relative_difference(after, before) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_rows_on_family_expect_any_order_to_keep_the_output(family: str) -> None:
    shell = ModelShell.open(make_model(family))
    site = next(site for site in shell.structures[0].sites if site.kind == "mlp_output")
    rows = find_hidden_rows(shell, 0, site)
    assert rows is not None
    order = torch.randperm(site.width, generator=torch.Generator().manual_seed(4))
    before, after = outputs(shell, lambda block: permute_hidden(block, rows, site, order))
    assert relative_difference(after, before) < TOLERANCE
    forgotten = rows[1:]  # gate keeps its order
    before, after = outputs(shell, lambda block: permute_hidden(block, forgotten, site, order))
    assert relative_difference(after, before) > 1e-3


def test_query_key_rows_when_a_block_does_something_else_with_keys_expect_none() -> None:
    shell = ModelShell.open(make_model("llama"))
    attention = shell._empty[0].get_submodule("self_attn")

    class Bounded(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x))

    keys = attention.get_submodule("k_proj")
    assert isinstance(keys, nn.Linear)
    keys.__class__ = Bounded
    assert find_query_key_rows(shell, 0) is None
