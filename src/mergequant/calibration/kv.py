"""What a block puts into a cache: keys after rotary embedding, and values, seen through transformers' own interface."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from mergequant.calibration.chain import Chain, Role, check_finite

__all__ = ["record_kv"]


def record_kv(chain: Chain, role: Role, tokens: int) -> tuple[Tensor, Tensor] | None:
    """Keys and values that the current block, as it stands, makes of the first chunks of a role.

    The prefix's own keys and values, which no cache quantizes, are not among them.

    Args:
        chain: the block is at its position.
        role: of the chunks.
        tokens: chunks are run until there are so many.

    Returns:
        Keys (tokens, kv_heads, key_width) and values (tokens, kv_heads, value_width), with at most `tokens` tokens;
        None for a block that keeps no keys and values of its own.

    Raises:
        NumericsError: one of them is not finite.
    """
    keys: list[Tensor] = []
    values: list[Tensor] = []
    held = 0
    for number in chain.numbers(role):
        if held >= tokens:
            break
        pair = _run(chain, number)
        if pair is None:
            return None
        name = chain.shell.block_names[chain.position]
        for own, seen, what in ((keys, pair[0], "key"), (values, pair[1], "value")):
            check_finite(seen, f"{name}: {what}")
            own.append(seen.transpose(1, 2).flatten(0, 1)[: tokens - held])
        held += keys[-1].shape[0]
    return (torch.cat(keys), torch.cat(values)) if held else None


class _Recorder(DynamicCache):
    """A cache that also remembers what it was given."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.seen: list[tuple[int, Tensor, Tensor]] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As the base class."""
        self.seen.append((layer_idx, key_states, value_states))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def _run(chain: Chain, number: int) -> tuple[Tensor, Tensor] | None:
    """Keys and values (windows, kv_heads, tokens, width) of one chunk."""
    recorder = _Recorder(chain.shell.config)
    kwargs = chain.cached_arguments(number, recorder)
    if kwargs is None:
        return None
    recorder.seen.clear()  # the prefix
    chain.shell.run_block(chain.position, chain.hidden[number], kwargs)
    if len(recorder.seen) != 1:
        return None
    layer, keys, values = recorder.seen[0]
    alike = keys.dim() == values.dim() == 4 and keys.shape[:3] == values.shape[:3]
    return (keys, values) if layer == chain.position and alike else None
