"""Caches and inputs for the tests of the cache ops, on any device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mergequant.ops import kv_layout

CAPACITY = 192


@dataclass
class Case:
    """One call of `kv_append` and `kv_attention`: sizes, tensors that both take, and the generator of more."""

    batch: int
    heads: int
    key_heads: int
    width: int
    bits: int
    capacity: int
    dtype: torch.dtype
    device: str
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        limit = kv_layout.code_limit(self.bits) if self.bits < 16 else 1
        # Keys of about unit spread, values with channels of unlike sizes.
        self.key_scale = self.uniform(self.key_heads, self.width, low=1.0, high=3.0) / limit
        self.value_scale = self.uniform(self.key_heads, self.width, low=0.2, high=4.0) / limit
        angles = torch.arange(self.capacity)[:, None] / 10000 ** (torch.arange(self.width // 2) * 2 / self.width)
        self.cos, self.sin = angles.cos().to(self.device), angles.sin().to(self.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return (torch.rand(shape, generator=self.generator) * (high - low) + low).to(self.device)

    def lengths(self, *values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def qkv(self, tokens: int) -> Tensor:
        return self.normal(self.batch, tokens, (self.heads + 2 * self.key_heads) * self.width)

    def random_cache(self) -> tuple[Tensor, Tensor]:
        """Caches of random codes (or floats), as bytes of the layout."""
        shape = (self.batch, self.key_heads, self.capacity, self.width)
        if self.bits == 16:
            return self.normal(*shape), self.normal(*shape)
        limit = kv_layout.code_limit(self.bits)
        codes = [torch.randint(-limit, limit + 1, shape, generator=self.generator, dtype=torch.int8) for _ in range(2)]
        packed = kv_layout.pack_keys(codes[0], self.bits), kv_layout.pack_values(codes[1], self.bits)
        return packed[0].to(self.device), packed[1].to(self.device)

    def append_arguments(self, tokens: int, lengths: Tensor, norms: bool = False) -> dict[str, Any]:
        keys, values = self.random_cache()
        return {
            "qkv": self.qkv(tokens),
            "cos": self.cos,
            "sin": self.sin,
            "lengths": lengths,
            "key_cache": keys,
            "value_cache": values,
            "key_scale": self.key_scale,
            "value_scale": self.value_scale,
            "query_norm": self.uniform(self.width, low=0.5, high=1.5) if norms else None,
            "key_norm": self.uniform(self.width, low=0.5, high=1.5) if norms else None,
            "eps": 1e-6,
            "heads": self.heads,
            "bits": self.bits,
        }

    def attention_arguments(self, lengths: Tensor, prefix: int = 0, out_bits: int = 0) -> dict[str, Any]:
        keys, values = self.random_cache()
        chosen: dict[str, Any] = {
            "q": self.normal(self.batch, self.heads, self.width),
            "key_cache": keys,
            "value_cache": values,
            "lengths": lengths,
            "key_scale": self.key_scale,
            "value_scale": self.value_scale,
            "softmax_scale": 2.0 / self.width**0.5,
            "bits": self.bits,
            "most": max(1, int(lengths.max())),
        }
        if prefix:
            chosen["prefix_key"] = self.normal(self.key_heads, prefix, self.width)
            chosen["prefix_value"] = self.normal(self.key_heads, prefix, self.width)
        if out_bits:
            chosen["out_multiplier"] = self.uniform(self.heads * self.width, low=20.0, high=90.0)
            chosen["out_bits"] = out_bits
        return chosen


def decoded(case: Case, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Caches as float64 (batch, key_heads, capacity, width), through the packers only."""
    if case.bits == 16:
        return keys.double(), values.double()
    k = kv_layout.unpack_keys(keys, case.width, case.bits).double() * case.key_scale.double()[:, None]
    v = kv_layout.unpack_values(values, case.width, case.bits).double() * case.value_scale.double()[:, None]
    return k, v


def plain_attention(case: Case, arguments: dict[str, Any]) -> Tensor:
    """float64 (batch, heads * width), row by row and head by head."""
    k, v = decoded(case, arguments["key_cache"], arguments["value_cache"])
    out = torch.zeros(case.batch, case.heads, case.width, dtype=torch.float64, device=case.device)
    for row in range(case.batch):
        length = int(arguments["lengths"][row])
        for head in range(case.heads):
            own = head // (case.heads // case.key_heads)
            keys, values = k[row, own, :length].clone(), v[row, own, :length].clone()
            if arguments.get("prefix_key") is not None:
                few = min(length, arguments["prefix_key"].shape[1])
                keys[:few] = arguments["prefix_key"][own, :few].double()
                values[:few] = arguments["prefix_value"][own, :few].double()
            if length:
                score = keys @ arguments["q"][row, head].double() * arguments["softmax_scale"]
                out[row, head] = torch.softmax(score, 0) @ values
    return out.flatten(1)


class Paged:
    """A case's caches in pages: rows own random pages, and a few pages belong to none.

    Attributes:
        pages: uint8 (pages, 2, key_heads, page, bytes), random codes.
        table: int32 (batch, pages of a row); what lies behind a row is not looked at.
    """

    def __init__(self, case: Case, page: int) -> None:
        self.case, self.page = case, page
        each = -(-case.capacity // page)
        count = case.batch * each + 2
        order = torch.randperm(count, generator=case.generator)[: count - 2]
        self.table = order.view(case.batch, each).to(case.device, torch.int32)
        halves = Case(count, 1, case.key_heads, case.width, case.bits, page, case.dtype, case.device, case.seed)
        self.pages = torch.stack(halves.random_cache(), 1)

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Put contiguous caches (batch, key_heads, capacity, bytes) into the rows' pages."""
        for part, cache in enumerate((keys, values)):
            cut = cache.unflatten(2, (-1, self.page)).transpose(1, 2)
            self.pages[self.table.flatten().long(), part] = cut.flatten(0, 1)

    def rows(self, part: int) -> Tensor:
        """Keys (0) or values (1) of the rows as contiguous caches."""
        return self.pages[self.table.long()][:, :, part].transpose(1, 2).flatten(2, 3)

    def slots(self, tokens: Tensor) -> Tensor:
        """Slots of tokens (batch, n), counted from each row's first."""
        numbers = self.table.long().gather(1, tokens // self.page)
        return numbers * self.page + tokens % self.page

    def mark(self, rows: tuple[int, ...]) -> None:
        """Mark the first pages of these rows, and of no others."""
        mask = 2**self.case.bits - 1
        for row, number in enumerate(self.table[:, 0].tolist()):
            first = self.pages[number, 0, :, 0, 0]
            first &= 255 - mask
            first |= kv_layout.mark_code(self.case.bits) & mask if row in rows else 1

    def attention_arguments(self, contiguous: dict[str, Any]) -> dict[str, Any]:
        """Arguments of `kv_page_attention`, without `out`, for those of `kv_attention`, whose caches fill the pages."""
        given = {name: value for name, value in contiguous.items() if name not in ("key_cache", "value_cache")}
        self.fill(contiguous["key_cache"], contiguous["value_cache"])
        return given | {"pages": self.pages, "table": self.table}

    def read_arguments(self, past: tuple[int, ...], fresh: tuple[int, ...], prefix: bool) -> dict[str, Any]:
        """Arguments of `kv_page_read` for rows of so many old and fresh tokens."""
        case, heads = self.case, (self.case.key_heads, self.case.width)
        sizes = [old + new for old, new in zip(past, fresh)]
        starts, fresh_starts = (torch.tensor([0, *x]).cumsum(0).int().to(case.device) for x in (sizes, fresh))
        given: dict[str, Any] = {"pages": self.pages, "table": self.table, "starts": starts}
        given |= {"fresh_starts": fresh_starts, "key_scale": case.key_scale, "value_scale": case.value_scale}
        given |= {"bits": case.bits, "most": max(sizes)}
        for name in ("key", "value"):
            given[name] = case.normal(sum(fresh), *heads)
            given[f"out_{name}"] = case.normal(sum(sizes) + 3, *heads)
            if prefix:
                given[f"prefix_{name}"] = case.normal(case.key_heads, 1, case.width)
        return given
