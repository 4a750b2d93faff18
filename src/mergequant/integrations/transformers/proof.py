"""The proof that a `Decoder` computes what its model computes: block by block, on the very inputs that the model had.

Comparing logits at the end would prove little. Codes sit on rounding borders; a last bit somewhere flips one, the next
block sees a slightly different input, and with 4-bit activations the ends of two correct runs may differ by a third of
their spread. So each block gets the hidden states that the model's own block got, and rounding cannot pile up.

Twice: in float32 through the torch references, where rounding explains nearly nothing, which proves the structure
(names, order, biases, norms, rotation, prefix); and in the model's dtype through the kernels that will run, with room
for 16-bit rounding and for the quantized cache, which catches a kernel that goes wrong on this machine.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mergequant.checkpoint import PREFIX_MODULE
from mergequant.errors import UsageError
from mergequant.nn import PrefixStore, QuantLinear, QuantModule
from mergequant.ops.backends import use_backend
from mergequant.runtime import Decoder, KVFormat

__all__ = ["Proof", "Recording", "prove", "record"]

PROMPT, STEPS = 24, 4  # tokens: one prefill, then single steps
EXACT = 0.02  # what flipped codes may do to a block in float32; a forgotten part does ten times as much
# In 16 bits: the rounded residual moves codes at both norms and behind attention, more of them where a code is coarse.
ROUNDED = {8: 0.15, 4: 0.6}
CACHE = {16: 0.0, 8: 0.05, 4: 0.3}  # and what a quantized cache adds to a step
RESIDUAL_ROUNDINGS = 4  # of the residual itself, which may be far larger than what a block adds to it


@dataclass(frozen=True, eq=False)
class Recording:
    """One run of the model over PROMPT + STEPS tokens.

    Attributes:
        ids: int64 (1, tokens) that the blocks saw, without what the prefix stands for.
        hidden: (tokens, channels) before each block, and behind the last one.
        logits: (1 + STEPS, vocabulary) of the last tokens.
    """

    ids: Tensor
    hidden: list[Tensor]
    logits: Tensor


@dataclass(frozen=True)
class Proof:
    """Largest relative deviations that were found, of any block or of the logits.

    Attributes:
        exact: in float32 through the references.
        prompt: in the model's dtype, of the prompt's tokens.
        steps: of the single steps, over the cache that was chosen.
    """

    exact: float
    prompt: float
    steps: float


@torch.no_grad()
def record(model: Any, exact: bool) -> Recording:
    """Run the model itself on a few random tokens, in float32 or as it is."""
    store: PrefixStore | None = getattr(model.model, PREFIX_MODULE, None)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(0))
    bos = store.spec.tokens[0] if store is not None else model.config.bos_token_id
    if isinstance(bos, int) and 0 <= bos < vocabulary:
        ids[:, 0] = bos
    ids = ids.to(model.device)
    hidden: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append((args[0] if args else kwargs["hidden_states"])[0].clone())

    def behind(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden.append((output[0] if isinstance(output, tuple) else output)[0].clone())

    blocks = list(model.model.layers)
    hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    hooks.append(blocks[-1].register_forward_hook(behind))
    try:
        with _float32(model, exact):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=STEPS + 1).logits[0]
    finally:
        for hook in hooks:
            hook.remove()
    return Recording(ids[:, ids.shape[1] - hidden[0].shape[0] :], hidden, logits)


@torch.no_grad()
def prove(decoder: Decoder, model: Any, exact: Recording, rounded: Recording) -> Proof:
    """Compare a decoder with two recordings of its model, `record(model, True)` and `record(model, False)`.

    Raises:
        UsageError: a deviation that rounding does not explain, with its place.
    """
    with _float32(model, True), use_backend("torch"):
        twin = _in_float32(decoder)
        found = max(_check(twin, exact, EXACT, EXACT))
    limit = ROUNDED[8 if _activation_bits(model) > 4 else 4]
    prompt, steps = _check(decoder, rounded, limit, limit + CACHE[decoder.kv.bits])
    return Proof(found, prompt, steps)


def _check(decoder: Decoder, recording: Recording, prompt_limit: float, step_limit: float) -> tuple[float, float]:
    """Largest deviation over the prompt's tokens and over the steps', of any block or of the head."""
    embedded = nn.functional.embedding(recording.ids[0], decoder.embedding)
    _require(_deviation(embedded, recording.hidden[0], 0.0), prompt_limit, "the embedding")
    worst = [0.0, 0.0]
    for number, (given, wanted) in enumerate(zip(recording.hidden, recording.hidden[1:])):
        got = decoder.run_layer(number, given[None], STEPS)[0]
        # Relative to what the block adds; a residual that is far larger is rounded to its own precision, though.
        floor = RESIDUAL_ROUNDINGS * torch.finfo(given.dtype).eps * given.float().norm(dim=-1)
        off = (got.float() - wanted.float()).norm(dim=-1) / ((wanted.float() - given.float()).norm(dim=-1) + floor)
        for part, (tokens, limit) in enumerate(((off[:-STEPS], prompt_limit), (off[-STEPS:], step_limit))):
            mean = float(tokens.mean())
            where = f"block {number}, {'the steps' if part else 'the prompt'} (cache of {decoder.kv.bits} bits)"
            _require(mean, limit, where)
            worst[part] = max(worst[part], mean)
    logits = decoder.logits(recording.hidden[-1][-STEPS - 1 :])
    worst[0] = max(worst[0], _require(_deviation(logits, recording.logits, 0.0), prompt_limit, "the head"))
    return worst[0], worst[1]


def _deviation(got: Tensor, wanted: Tensor, floor: float) -> float:
    return float((got.float() - wanted.float()).norm() / (wanted.float().norm() + floor))


def _require(value: float, limit: float, where: str) -> float:
    if not value <= limit:  # NaN is not small either
        raise UsageError(
            f"the fast loop deviates from the model by {value:.3f} in {where}, where rounding explains {limit:.2f}; "
            "it is not used"
        )
    return value


def _activation_bits(model: nn.Module) -> int:
    """Fewest bits of any codes that linear layers read; 16 if none are."""
    specs = [module.spec.input for module in model.modules() if isinstance(module, QuantLinear)]
    return min((spec.bits for spec in specs if spec.kind != "float"), default=16)


@contextmanager
def _float32(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Parameters in float32 for a while, and back as they were, bit for bit.

    `model.float()` and back would also round buffers that must stay in float32, such as rotary frequencies.
    """
    parameters = [p for p in model.parameters() if p.is_floating_point()] if enabled else []
    modules = [module for module in model.modules() if isinstance(module, QuantModule)] if enabled else []
    before = [parameter.data for parameter in parameters]
    dtypes = [module.out_dtype for module in modules]
    try:
        for parameter in parameters:
            parameter.data = parameter.data.float()
        for module in modules:
            module.out_dtype = torch.float32
        yield
    finally:
        for parameter, data in zip(parameters, before):
            parameter.data = data
        for module, dtype in zip(modules, dtypes):
            module.out_dtype = dtype


def _in_float32(decoder: Decoder) -> Decoder:
    """The decoder on a float cache with the prefix as it is stored; its parameters are the model's own."""
    ones = torch.ones_like(decoder.kv.key_scale)
    layers = decoder.layers
    if (store := decoder.prefix) is not None:
        layers = tuple(
            replace(
                layer,
                attention=replace(layer.attention, prefix_key=store.keys[number], prefix_value=store.values[number]),
            )
            for number, layer in enumerate(layers)
        )
    return replace(decoder, layers=layers, kv=KVFormat(16, ones, ones))
