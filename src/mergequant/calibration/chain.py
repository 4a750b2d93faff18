"""The chain: hidden states of all windows, carried through the model one block at a time.

Windows are cut into chunks, each with a role: calibration, held-out (the recipe's own choices) or verify (kept apart
until the end, compared with the reloaded checkpoint). With a prefix, every chunk attends to the prefix's keys and
values, and a window's own BOS, which the prefix stands for, is not run.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from mergequant.calibration.store import ActivationStore, StorePolicy
from mergequant.errors import NumericsError, StructureError
from mergequant.models import ModelShell

__all__ = ["Chain", "Chunk", "Prefix", "Role", "check_finite", "chunked"]

Role = Literal["calibration", "held_out", "verify"]
TOKENS_PER_CHUNK = 4096


@dataclass(frozen=True)
class Chunk:
    """Some windows that run together: tokens (batch, seqlen) and what they are for."""

    tokens: Tensor
    role: Role


@dataclass
class Prefix:
    """The prefix on its way through the float model.

    Attributes:
        tokens: int64 (1, P).
        replaces_bos: windows begin with BOS, which the prefix stands for.
        hidden: (1, P, channels), entering the current block.
        keys, values: (1, kv_heads, P, width) of the current block, after rotary embedding.
    """

    tokens: Tensor
    replaces_bos: bool
    hidden: Tensor
    keys: Tensor
    values: Tensor


class Chain:
    """Hidden states before the current block, for all chunks, and how a block is run on them."""

    def __init__(
        self, shell: ModelShell, chunks: list[Chunk], policy: StorePolicy, prefix: tuple[list[int], bool] | None
    ):
        self.shell = shell
        self.policy = policy
        self.chunks = chunks
        self.position = 0
        self._kwargs: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self.prefix: Prefix | None = None
        if prefix is not None:
            self._start_prefix(*prefix)
        self.hidden = ActivationStore(policy)
        for chunk in chunks:
            entering, kwargs = shell.block_kwargs(self._run_tokens(chunk.tokens), cache=self._empty_cache())
            self._remember(entering.shape[:2], kwargs)
            self.hidden.append(entering)

    def numbers(self, role: Role) -> list[int]:
        """Positions of the chunks of a role."""
        return [number for number, chunk in enumerate(self.chunks) if chunk.role == role]

    def run(self, hidden: Tensor) -> Tensor:
        """Run the current block, as it stands, on one chunk's hidden states."""
        return self.shell.run_block(self.position, hidden, self.arguments(hidden))

    def arguments(self, hidden: Tensor) -> dict[str, Any]:
        """What the current block is called with besides one chunk's hidden states; the cache in it is a fresh one."""
        batch, length = hidden.shape[:2]
        if (batch, length) not in self._kwargs:
            self._record(batch, length)
        kwargs = self._kwargs[batch, length][self.position]
        cache = self._block_cache(batch)
        if cache is not None:
            return {name: cache if isinstance(value, Cache) else value for name, value in kwargs.items()}
        return kwargs

    def cached_arguments(self, number: int, cache: Cache) -> dict[str, Any] | None:
        """As `arguments` for chunk `number`, with an empty cache of the caller's, which is given the prefix here.

        None if the model hands its block no cache.
        """
        windows = self.chunks[number].tokens
        asked = self._empty_cache() or cache
        kwargs = self.shell.block_kwargs(self._run_tokens(windows), cache=asked)[1][self.position]
        if not any(isinstance(value, Cache) for value in kwargs.values()):
            return None
        self._fill(cache, windows.shape[0])
        return {name: cache if isinstance(value, Cache) else value for name, value in kwargs.items()}

    def begin_block(self) -> None:
        """Compute the prefix's keys and values in the current block, which still holds its float weights."""
        if self.prefix is None:
            return
        cache = DynamicCache(config=self.shell.config)
        kwargs = self.shell.block_kwargs(self.prefix.tokens, cache=cache)[1][self.position]
        kwargs = {name: cache if isinstance(value, Cache) else value for name, value in kwargs.items()}
        self.prefix.hidden = self.shell.run_block(self.position, self.prefix.hidden, kwargs)
        layer = cache.layers[self.position]
        if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
            raise StructureError(
                f"{self.shell.block_names[self.position]} keeps no keys and values ({type(layer).__name__}): a prefix "
                "cannot be stored for it; choose a recipe without a prefix (other=dynamic)"
            )
        self.prefix.keys, self.prefix.values = layer.keys, layer.values

    def advance(self) -> None:
        """Replace every chunk's hidden states by the current block's output and go to the next block.

        Raises:
            NumericsError: naming the block and the channel of the first non-finite value.
        """
        name = self.shell.block_names[self.position]
        for number in range(len(self.chunks)):
            output = self.run(self.hidden[number])
            check_finite(output, f"{name}: output of the block")
            self.hidden.replace(number, output)
        self.position += 1

    def logits(self, number: int, rows: slice = slice(None)) -> Tensor:
        """Logits of a chunk, or of some windows of it, after the last block (windows, tokens run, vocabulary)."""
        tokens = self._run_tokens(self.chunks[number].tokens)[rows]
        return self.shell.logits(tokens, self.hidden[number][rows])

    def outputs(self, number: int) -> dict[str, Tensor]:
        """All that the model returns for a chunk after the last block, by name.

        The hidden states are among them where the model predicts no tokens: what it returns may depend on few of them.
        """
        found = self.shell.outputs(self._run_tokens(self.chunks[number].tokens), self.hidden[number])
        return found if self.shell.generates else {**found, "hidden_states": self.hidden[number]}

    def prefix_output(self) -> Tensor:
        """What the decoder gives for the prefix after its last block (P, channels): normed, projected, as it does."""
        prefix = self._require_prefix()
        return self.shell.final_hidden(prefix.tokens, prefix.hidden)[0]

    def close(self) -> None:
        """Free the hidden states."""
        self.hidden.close()

    def _require_prefix(self) -> Prefix:
        if self.prefix is None:
            raise StructureError("this chain runs without a prefix")
        return self.prefix

    def _run_tokens(self, tokens: Tensor) -> Tensor:
        skip = 1 if self.prefix is not None and self.prefix.replaces_bos else 0
        return tokens[:, skip:]

    def _start_prefix(self, tokens: list[int], replaces_bos: bool) -> None:
        ids = torch.tensor([tokens])
        entering, _ = self.shell.block_kwargs(ids, cache=DynamicCache(config=self.shell.config))
        empty = torch.empty(0, device=self.shell.device)
        self.prefix = Prefix(ids, replaces_bos, entering, empty, empty)

    def _empty_cache(self) -> Cache | None:
        """A cache as long as the prefix: masks and positions depend on its length, not on its content."""
        if self.prefix is None:
            return None
        cache = DynamicCache(config=self.shell.config)
        for index in range(len(self.shell.blocks)):
            empty = torch.zeros(1, 1, self.prefix.tokens.shape[1], 1, device=self.shell.device)
            cache.update(empty, empty, index)
        return cache

    def _block_cache(self, batch: int) -> Cache | None:
        if self.prefix is None:
            return None
        cache = DynamicCache(config=self.shell.config)
        self._fill(cache, batch)
        return cache

    def _fill(self, cache: Cache, batch: int) -> None:
        """Put the prefix, if there is one, into the current block's part of an empty cache."""
        if self.prefix is not None:
            keys, values = (part.expand(batch, -1, -1, -1) for part in (self.prefix.keys, self.prefix.values))
            cache.update(keys, values, self.position)

    def _record(self, batch: int, length: int) -> None:
        """Arguments of the blocks for part of a chunk's windows."""
        for chunk in self.chunks:
            tokens = self._run_tokens(chunk.tokens[:batch])
            if tokens.shape == (batch, length):
                entering, kwargs = self.shell.block_kwargs(tokens, cache=self._empty_cache())
                self._remember(entering.shape[:2], kwargs)
                return
        raise StructureError(f"no chunk holds {batch} windows of {length} tokens")

    def _remember(self, shape: torch.Size, kwargs: list[dict[str, Any]]) -> None:
        """Keep a block's arguments once per chunk shape, after checking that they do not depend on the tokens."""
        key = (shape[0], shape[1])
        known = self._kwargs.setdefault(key, kwargs)
        if known is not kwargs and not all(_same(a, b) for a, b in zip(known, kwargs)):
            raise StructureError(
                f"{type(self.shell.model).__name__} passes its blocks arguments that depend on the tokens; "
                "such a model cannot be carried through block by block"
            )


def check_finite(value: Tensor, what: str) -> None:
    """Raise NumericsError that names the channel of the first value that is not finite."""
    finite = torch.isfinite(value)
    if not bool(finite.all()):
        channel = int((~finite).reshape(-1, value.shape[-1]).any(0).nonzero()[0])
        raise NumericsError(
            f"{what} is not finite at channel {channel}; the weights or the calibration data overflow here. "
            "Check the float model's own logits on this data, and that the file is not damaged"
        )


def chunked(tokens: Tensor, role: Role) -> Iterator[Chunk]:
    """Cut windows (N, T) into chunks of at most about 4096 tokens."""
    step = max(TOKENS_PER_CHUNK // tokens.shape[1], 1)
    for start in range(0, tokens.shape[0], step):
        yield Chunk(tokens[start : start + step], role)


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(_same(first[name], second[name]) for name in first)
    if isinstance(first, (tuple, list)):
        return len(first) == len(second) and all(_same(a, b) for a, b in zip(first, second))
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    return isinstance(first, Cache) or first == second
