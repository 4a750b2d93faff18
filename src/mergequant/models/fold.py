"""Rows of a block that can be scaled or put into another order together, found by trying and proven in float64.

Structure (`discover`) knows what can be scaled in front of a site. Two more facts are needed by recipes that change
what lies between projections: which rows make queries and keys (whose product alone counts), and which rows make the
channels between the two layers of an MLP (whose order does not count). No name is asked: candidates are tried on a
block with random parameters, and taken if its output stays the same to 1e-10.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from mergequant.models.probe import TOLERANCE, relative_difference
from mergequant.models.roles import BlockStructure, RowSlice, Site
from mergequant.models.shell import ModelShell

__all__ = ["QueryKeyRows", "find_hidden_rows", "find_query_key_rows", "permute_hidden"]

Found = TypeVar("Found")
Pairing = Literal["halves", "neighbours", "none"]
PAIRINGS: tuple[Pairing, ...] = ("halves", "neighbours", "none")
SEED = 2


@dataclass(frozen=True)
class QueryKeyRows:
    """Rows that make queries and keys.

    Attributes:
        queries: slices of rows, in the order of the heads.
        keys: rows of all key heads.
        heads, width: number of key heads, and channels of one.
        pairing: which channels of a head rotary embedding mixes: c and c + width / 2, c and c + 1, or none.
    """

    queries: tuple[RowSlice, ...]
    keys: RowSlice
    heads: int
    width: int
    pairing: Pairing

    def tie(self, values: Tensor) -> Tensor:
        """Values of key channels (heads, width), the larger one for both channels of a pair."""
        if self.pairing == "none":
            return values
        axis = 1 if self.pairing == "halves" else 2
        shape = (self.heads, 2, -1) if self.pairing == "halves" else (self.heads, -1, 2)
        pairs = values.reshape(shape)
        return pairs.amax(axis, keepdim=True).expand(pairs.shape).reshape(values.shape)

    def scale(self, block: nn.Module, factor: Tensor) -> None:
        """Divide the keys by a factor (heads, width), equal within pairs, and multiply the queries by it, in place."""
        count = sum(rows.stop - rows.start for rows in self.queries) // factor.numel()
        spread = factor.repeat_interleave(count, 0).flatten()  # query heads that share a key head are neighbours
        first = 0
        for rows in self.queries:
            size = rows.stop - rows.start
            _scale_rows(block, rows, spread[first : first + size])
            first += size
        _scale_rows(block, self.keys, 1 / factor.flatten())


def find_query_key_rows(shell: ModelShell, index: int) -> QueryKeyRows | None:
    """Rows of block `index` that make queries and keys; None where none are proven (as with a norm behind them)."""
    return _remembered(shell, index, "query_key", lambda: _search_query_key(shell, index))


def find_hidden_rows(shell: ModelShell, index: int, site: Site) -> tuple[RowSlice, ...] | None:
    """Slices of `site.width` rows each that together make the channels of an MLP's output site; None if unproven."""
    return _remembered(shell, index, site.name, lambda: _search_hidden(shell, index, site))


def permute_hidden(block: nn.Module, rows: tuple[RowSlice, ...], site: Site, order: Tensor) -> None:
    """Put the channels of a site (width,) into another order: new channel i is the old one order[i]. In place."""
    for part in rows:
        for parameter in block.get_submodule(part.linear).parameters():
            own = parameter.detach()[part.start : part.stop]
            own.copy_(own[order])
    for name in site.consumers:
        weight = block.get_submodule(name).get_parameter("weight").detach()
        weight.copy_(weight[:, order])


_known: WeakKeyDictionary[ModelShell, dict[tuple[int, str], object]] = WeakKeyDictionary()


def _remembered(shell: ModelShell, index: int, what: str, search: Callable[[], Found]) -> Found:
    """Blocks of one kind share a structure, and are searched once."""
    known = _known.setdefault(shell, {})
    key = id(shell.structures[index]), what
    if key not in known:
        with torch.no_grad():
            known[key] = search()
    return cast(Found, known[key])


def _search_query_key(shell: ModelShell, index: int) -> QueryKeyRows | None:
    structure = shell.structures[index]
    output = next((site for site in structure.sites if site.kind == "attention_output"), None)
    if output is None or output.producer is None:
        return None
    values = output.producer.rows
    rest = list(_rows_beside(shell, index, structure, values))
    count = values.stop - values.start
    width = _head_width(shell)
    if not rest or count % width or (sum(rows.stop - rows.start for rows in rest) - count) % count:
        return None
    for keys, queries in _candidates(rest, count):
        if not _reaches_later_tokens(shell, index, keys) or any(
            _reaches_later_tokens(shell, index, rows) for rows in queries
        ):
            continue
        for pairing in PAIRINGS if width % 2 == 0 else ("none",):
            found = QueryKeyRows(queries, keys, count // width, width, pairing)
            if _keeps_output(shell, index, lambda block, found=found: _scale_randomly(block, found)):  # type: ignore[misc]
                return found
    return None


def _search_hidden(shell: ModelShell, index: int, site: Site) -> tuple[RowSlice, ...] | None:
    structure = shell.structures[index]
    before = [other for other in structure.sites[: structure.sites.index(site)] if other.norm is not None]
    shapes = shell.block_parameters(index)
    rows = tuple(
        RowSlice(name, start, start + site.width)
        for name in (before[-1].consumers if before else ())
        for start in range(0, shapes[f"{name}.weight"][0] - site.width + 1, site.width)
    )
    order = torch.randperm(site.width, generator=torch.Generator().manual_seed(SEED)).to(shell.device)
    if rows and _keeps_output(shell, index, lambda block: permute_hidden(block, rows, site, order)):
        return rows
    return None


def _rows_beside(shell: ModelShell, index: int, structure: BlockStructure, values: RowSlice) -> Iterator[RowSlice]:
    """Rows of the linears that read what the value projection reads, without the values themselves."""
    shapes = shell.block_parameters(index)
    site = next((site for site in structure.sites if values.linear in site.consumers), None)
    for name in site.consumers if site is not None else ():
        total = shapes[f"{name}.weight"][0]
        if name != values.linear:
            yield RowSlice(name, 0, total)
            continue
        if values.start:
            yield RowSlice(name, 0, values.start)
        if values.stop < total:
            yield RowSlice(name, values.stop, total)


def _candidates(rest: list[RowSlice], count: int) -> Iterator[tuple[RowSlice, tuple[RowSlice, ...]]]:
    """Which `count` rows may be the keys, and the queries beside them: the last ones, or the first ones."""
    last, first = rest[-1], rest[0]
    if last.stop - last.start >= count:
        left = (RowSlice(last.linear, last.start, last.stop - count),) if last.stop - last.start > count else ()
        yield RowSlice(last.linear, last.stop - count, last.stop), (*rest[:-1], *left)
    if first.stop - first.start >= count:
        left = (RowSlice(first.linear, first.start + count, first.stop),) if first.stop - first.start > count else ()
        yield RowSlice(first.linear, first.start, first.start + count), (*left, *rest[1:])


def _reaches_later_tokens(shell: ModelShell, index: int, rows: RowSlice) -> bool:
    """Whether what these rows give for one token changes the output of later ones: keys do, queries do not."""
    block, run, hidden = shell.random_block(index, torch.Generator().manual_seed(SEED))
    token = hidden.shape[1] // 2
    before = run(block, hidden)

    def disturb(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[:, token, rows.start : rows.stop] *= -2
        return changed

    handle = block.get_submodule(rows.linear).register_forward_hook(disturb)
    after = run(block, hidden)
    handle.remove()
    return relative_difference(after[:, token + 1 :], before[:, token + 1 :]) > TOLERANCE


def _keeps_output(shell: ModelShell, index: int, change: Callable[[nn.Module], None]) -> bool:
    """Whether a block with random float64 parameters gives the same after a change."""
    block, run, hidden = shell.random_block(index, torch.Generator().manual_seed(SEED))
    before = run(block, hidden)
    change(block)
    return relative_difference(run(block, hidden), before) <= TOLERANCE


def _scale_randomly(block: nn.Module, rows: QueryKeyRows) -> None:
    parameter = next(block.parameters())
    drawn = torch.rand(rows.heads, rows.width, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    rows.scale(block, torch.exp2(4 * rows.tie(drawn) - 2).to(parameter.device))


def _scale_rows(block: nn.Module, rows: RowSlice, factor: Tensor) -> None:
    for parameter in block.get_submodule(rows.linear).parameters():
        part = parameter.detach()[rows.start : rows.stop]
        part.mul_((factor if part.dim() == 1 else factor[:, None]).to(part))


def _head_width(shell: ModelShell) -> int:
    config = shell.config.get_text_config()
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
