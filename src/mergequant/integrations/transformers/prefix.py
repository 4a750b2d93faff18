"""Serving a stored prefix in transformers: every cache starts with the prefix's keys and values.

The decoder's `forward` is replaced on the instance. A call on an empty cache fills it, drops the prompt's own BOS when
the prefix stands for it, and puts the stored hidden state in its place, so that callers see the lengths they expect.

Columns and positions: with P prefix tokens, of which `strip` (0 or 1) stand for a column of the caller's, everything
after the prefix moves right by shift = P - strip. In a row that is padded on the left, the row's own BOS column stays
in the tensors and is masked out for good: the prefix stands for it.
"""

import inspect
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from mergequant.checkpoint import PREFIX_MODULE
from mergequant.errors import InputError, StructureError
from mergequant.nn import PrefixStore

__all__ = ["find_decoder", "install_prefix"]

INNER = "_mergequant_inner_forward"


def install_prefix(model: nn.Module, store: PrefixStore, decoder: nn.Module | None = None) -> None:
    """Attach a prefix to the decoder that owns the blocks, and serve it from there. May be repeated.

    Afterwards `model` takes prompts, masks, positions and caches of transformers as before; `generate`, `copy.deepcopy`
    and `save_pretrained` work.

    Args:
        model: the whole model, with or without a head.
        store: the prefix; moved to the decoder's device.
        decoder: the module to attach to; None finds the one that owns the blocks.

    Raises:
        StructureError: no decoder is found.
    """
    if decoder is None:
        decoder = model.get_submodule(find_decoder(model, store.spec.layers))
    device = next((parameter.device for parameter in decoder.parameters()), None)
    decoder.add_module(PREFIX_MODULE, store if device is None or device.type == "meta" else store.to(device))
    if not _is_served(decoder.__dict__.get("forward")):
        # What accelerate may have put here (a device hook) stays in use; a bound method follows copy.deepcopy.
        decoder.__dict__[INNER] = decoder.__dict__.get("forward")
        decoder.__dict__["forward"] = types.MethodType(_forward, decoder)
    # A static cache makes `generate` build 4-D masks before the cache is filled; the 2-D mask is all that is needed.
    model.__dict__["create_masks_for_generate"] = _keep_mask


def find_decoder(model: nn.Module, layers: int) -> str:
    """Full name of the module that owns a list of `layers` blocks of one class, for Llama "model" ("" without a head).

    Raises:
        StructureError: there is none.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers and len({type(m) for m in module}) == 1:
            return name.rpartition(".")[0]
    raise StructureError(f"{type(model).__name__} has no list of {layers} equal blocks, for which the prefix was made")


@dataclass(frozen=True)
class _Call:
    """The arguments of a decoder's forward that a prefix changes."""

    ids: Tensor | None
    mask: Tensor | None
    positions: Tensor | None
    length: int  # columns that the caller passed


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The decoder's forward on a cache that starts with the prefix."""
    if args:
        names = list(inspect.signature(type(self).forward).parameters)[1:]  # the first is self
        kwargs.update(zip(names, args))
    store: PrefixStore = getattr(self, PREFIX_MODULE)
    config: Any = self.config
    given = kwargs.get("past_key_values")
    use_cache = kwargs.get("use_cache")
    keeps_cache = given is not None or (getattr(config, "use_cache", True) if use_cache is None else use_cache)
    return_dict = kwargs.pop("return_dict", None)
    cache = DynamicCache(config=config) if given is None else given
    filled = int(cache.get_seq_length())
    call = _arguments(kwargs, store, filled)
    _check_window(config, call, store)
    strip, shift = _strip(store), _shift(store)
    first = None
    if not filled:
        first = _first_columns(call, store)
        if strip and (_asks(config, kwargs, "output_hidden_states") or _asks(config, kwargs, "output_attentions")):
            raise InputError(
                "hidden states or attentions were asked for together with the prompt's BOS, for which the prefix has "
                "only keys, values and the last hidden state; run the BOS alone first and pass the cache on"
            )
        _check_room(cache, len(store.spec.tokens) + call.length - strip)
        batch = 1 if call.ids is None else call.ids.shape[0]
        store.fill(cache, batch, _dtype(self))
        kwargs["input_ids"] = None if call.ids is None else call.ids[:, strip:]
    elif shift:
        _check_room(cache, filled + call.length)
    kwargs["attention_mask"] = _moved_mask(call, store)
    kwargs["position_ids"] = _moved_positions(call, store, 0 if filled else strip)
    kwargs.update(past_key_values=cache, use_cache=True)
    if not filled and call.length == strip:
        output: Any = BaseModelOutputWithPast(past_key_values=cache)
    else:
        inner = self.__dict__.get(INNER) or types.MethodType(type(self).forward, self)
        output = inner(**kwargs, return_dict=True)
    if not filled and strip:
        output.last_hidden_state = _with_stored(output.last_hidden_state, call, store, first, _dtype(self))
    if not keeps_cache:
        output.past_key_values = None
    as_dict = getattr(config, "return_dict", True) if return_dict is None else return_dict
    return output if as_dict else output.to_tuple()


def _arguments(kwargs: dict[str, Any], store: PrefixStore, filled: int) -> _Call:
    """Check what kind of call it is: a 2-D mask of the right width, token ids on an empty cache."""
    ids, embeds, mask = kwargs.get("input_ids"), kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
    if not filled and ids is None:
        raise InputError(
            "inputs_embeds cannot start a sequence: the prefix's BOS is recognised by its id; pass input_ids"
        )
    source = embeds if ids is None else ids
    if source is None:
        raise InputError("neither input_ids nor inputs_embeds was passed; pass input_ids (batch, length)")
    if ids is not None and ids.dim() != 2:
        raise InputError(f"input_ids has shape {tuple(ids.shape)}; pass (batch, length)")
    length = source.shape[1]
    if mask is None:
        return _Call(ids, None, kwargs.get("position_ids"), length)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        kind = f"a {mask.dim()}-D tensor" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise InputError(
            f"attention_mask is {kind}, which a model with a stored prefix cannot serve; pass (batch, length)"
        )
    width = length + (filled - _shift(store) if filled else 0)
    if mask.shape[1] != width:
        raise InputError(
            f"attention_mask covers {mask.shape[1]} tokens and the cache with the new ones {width}; the cache holds "
            f"{_shift(store)} more than the prompt's own tokens: pass the new ones alone, with a mask over all of them"
        )
    return _Call(ids, mask.bool(), kwargs.get("position_ids"), length)


def _first_columns(call: _Call, store: PrefixStore) -> Tensor | None:
    """Column of each row's first real token (rows,), None without a mask. Where the prefix replaces BOS, it is BOS."""
    if call.ids is None or not _strip(store):
        return None
    if not call.length:
        raise InputError("the prompt is empty; start it with the BOS token, tokenizer(text) adds it")
    first = None if call.mask is None else call.mask.to(torch.int64).argmax(1)
    if call.mask is not None and not call.mask.any(1).all():
        row = int((~call.mask.any(1)).nonzero()[0])
        raise InputError(f"row {row} is all padding; each row must begin with the BOS token")
    found = call.ids[:, 0] if first is None else call.ids.gather(1, first[:, None])[:, 0]
    bos = store.spec.tokens[0]
    wrong = (found != bos).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise InputError(
            f"row {row} begins with token {int(found[row])} instead of BOS ({bos}), which this model's stored prefix "
            "stands for; use the tokenizer saved with the checkpoint: tokenizer(text, add_special_tokens=True) adds it"
        )
    return first


def _moved_mask(call: _Call, store: PrefixStore) -> Tensor | None:
    """The caller's mask with the prefix's columns in front, and without what the prefix stands for."""
    if call.mask is None:
        return None
    mask = call.mask
    if _strip(store):
        columns = torch.arange(mask.shape[1], device=mask.device)
        mask = (mask & (columns != mask.to(torch.int64).argmax(1, keepdim=True)))[:, 1:]
    return torch.cat([mask.new_ones(mask.shape[0], len(store.spec.tokens)), mask], 1)


def _moved_positions(call: _Call, store: PrefixStore, skip: int) -> Tensor | None:
    """Positions of the columns that are run: the caller's, or counted over the mask, moved right by the prefix."""
    positions = call.positions
    if positions is None:
        if call.mask is None:
            return None  # counted by the decoder from the cache's length, which holds the prefix
        positions = (call.mask.long().cumsum(1) - 1).clamp_min(0)[:, -call.length :] if call.length else None
    return None if positions is None else positions[..., skip:] + _shift(store)


def _with_stored(
    hidden: Tensor | None, call: _Call, store: PrefixStore, first: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Put the stored hidden state into each row's BOS column.

    A row that goes on shows what the float model showed at its BOS; a row that ends there must predict what follows the
    whole prefix, which is the last token's state.
    """
    stored = store.hidden.to(dtype)
    rows = 1 if call.ids is None else call.ids.shape[0]
    if hidden is None:
        return stored[-1].expand(rows, 1, -1)
    if call.mask is None or first is None:
        return torch.cat([stored[0].to(hidden).expand(rows, 1, -1), hidden], 1)
    hidden = torch.cat([hidden.new_zeros(rows, 1, hidden.shape[-1]), hidden], 1)
    ends = call.mask.sum(1) == 1
    own = torch.where(ends[:, None], stored[-1], stored[0]).to(hidden)
    columns = torch.arange(call.length, device=hidden.device)
    return torch.where((columns == first[:, None])[..., None], own[:, None], hidden)


def _check_window(config: Any, call: _Call, store: PrefixStore) -> None:
    """Sliding windows count columns: padding between the prefix and a row's tokens would push the prefix out early."""
    window = getattr(config, "sliding_window", None)
    if not window or call.mask is None or call.mask.shape[1] + _shift(store) <= window:
        return
    if not call.mask[:, 0].all():
        raise InputError(
            f"the batch is padded on the left and longer than the model's sliding window of {window} tokens, over "
            "which a stored prefix cannot be seen through the padding; run these prompts one at a time"
        )


def _check_room(cache: Any, needed: int) -> None:
    sizes = [layer.max_cache_len for layer in cache.layers if getattr(layer, "max_cache_len", None)]
    slides = any(getattr(layer, "is_sliding", False) for layer in cache.layers)
    if sizes and not slides and needed > min(sizes):
        raise InputError(
            f"the static cache has room for {min(sizes)} tokens, {needed} are needed: the stored prefix takes some; "
            "make it larger, or generate with cache_implementation='dynamic'"
        )


def _asks(config: Any, kwargs: dict[str, Any], name: str) -> bool:
    value = kwargs.get(name)
    return bool(getattr(config, name, False) if value is None else value)


def _dtype(decoder: nn.Module) -> torch.dtype:
    """Of the embedding: what hidden states, keys and values are in."""
    return next((p.dtype for p in decoder.parameters() if p.is_floating_point()), torch.get_default_dtype())


def _strip(store: PrefixStore) -> int:
    return int(store.spec.replaces_bos)


def _shift(store: PrefixStore) -> int:
    return len(store.spec.tokens) - _strip(store)


def _is_served(forward: Any) -> bool:
    return isinstance(forward, types.MethodType) and forward.__func__ is _forward


def _keep_mask(*, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """Stands in for transformers' function of the same call: the decoder builds its own masks."""
    return attention_mask
