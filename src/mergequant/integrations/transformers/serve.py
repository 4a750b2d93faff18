"""serve: `model.generate` of a loaded model on the fast loop, wherever that gives what was asked for.

`generate` is replaced on the instance. A request that the loop does not cover (beams, processors, other outputs, ...)
goes to transformers' own `generate`; the reason is logged once.
"""

import logging
import types
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, StaticCache

from mergequant.integrations.transformers.extract import extract, require_servable, with_cache
from mergequant.integrations.transformers.proof import Proof, prove, record
from mergequant.runtime import Decoder, Sampling, Steppers, generate

__all__ = ["Server", "serve"]

LOG = logging.getLogger("mergequant")
SERVER = "_mergequant_server"
COVERED = {  # fields of a generation config that the loop obeys, or that change nothing about tokens
    "max_length", "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "eos_token_id", "pad_token_id",
    "bos_token_id", "use_cache", "cache_implementation", "disable_compile", "compile_config", "transformers_version",
}  # fmt: skip
CACHES = (None, "static", "dynamic")
TENSORS = {"input_ids", "attention_mask", "past_key_values"}


@dataclass(eq=False)
class Server:
    """The fast loop of one model.

    Attributes:
        decoder: taken out of the model.
        proof: what comparing it with the model gave.
        dtype: of the model when it was taken.
        steppers: cache and graph of the last request.
        reasons: why requests went to transformers, as logged.
    """

    decoder: Decoder
    proof: Proof
    dtype: torch.dtype
    steppers: Steppers
    reasons: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class _Request:
    """What the loop is asked for."""

    ids: Tensor
    rows: list[list[int]]
    new_tokens: int
    sampling: Sampling
    eos: tuple[int, ...]
    pad: int


def serve(model: PreTrainedModel, kv_bits: int = 16) -> Server:
    """Let `model.generate` run on the fast loop. May be repeated, with other bits.

    Weights move into tiles, which the model's own forward reads too. Keys and values of the loop are its own: a cache
    that is passed to `generate` stays empty.

    Args:
        model: a loaded quantized model of the Llama kind, on one device.
        kv_bits: of the loop's cache: 16, 8 or 4 (these two need the scales that a checkpoint of this release holds).

    Raises:
        UsageError: the loop cannot run the model, or computes something else than the model; the message says why.
    """
    require_servable(model)
    exact = record(model, exact=True)  # by the weights as they were loaded, before they move into tiles
    known: Server | None = model.__dict__.get(SERVER)
    if known is not None and _reason_against_model(known, model) is None:
        decoder = with_cache(known.decoder, model, kv_bits)
    else:
        decoder = extract(model, kv_bits)
    # The second one by the tiles: a GPU would make others for it, and hold all weights twice for a while.
    proof = prove(decoder, model, exact, record(model, exact=False))
    server = Server(decoder, proof, model.dtype, Steppers(decoder))
    model.__dict__[SERVER] = server
    # A bound method follows copy.deepcopy to the copy of the model.
    model.__dict__["generate"] = types.MethodType(_generate, model)
    return server


@torch.no_grad()
def _generate(
    self: Any,
    inputs: Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Stands in for transformers' `generate` of the same arguments."""
    server: Server = self.__dict__[SERVER]
    request = "arguments by position" if args else _request(self, server, inputs, generation_config, kwargs)
    if isinstance(request, str):
        if request not in server.reasons:
            server.reasons.add(request)
            LOG.warning("generate runs on transformers, not on the fast loop: %s", request)
        return type(self).generate(self, inputs, generation_config, *args, **kwargs)
    streamer = kwargs.get("streamer")
    if streamer is not None:
        streamer.put(request.ids.cpu())

    def push(tokens: list[int | None]) -> None:
        assert streamer is not None  # else nobody calls this
        streamer.put(torch.tensor([request.pad if token is None else token for token in tokens]))

    written = generate(
        server.decoder,
        request.rows,
        request.new_tokens,
        sampling=request.sampling,
        eos=request.eos,
        on_tokens=None if streamer is None else push,
        steppers=server.steppers,
    )
    if streamer is not None:
        streamer.end()
    longest = max(len(row) for row in written)
    new = torch.tensor([row + [request.pad] * (longest - len(row)) for row in written], dtype=request.ids.dtype)
    return torch.cat([request.ids, new.to(request.ids.device)], 1)


def _request(
    model: Any, server: Server, inputs: Tensor | None, given: GenerationConfig | None, kwargs: dict[str, Any]
) -> _Request | str:
    """What is asked for, or the reason why the loop cannot do it."""
    if reason := _reason_against_model(server, model):
        return reason
    options = {name: value for name, value in kwargs.items() if name != "streamer"}
    config, rest = model._prepare_generation_config(given, **options)
    for name, value in rest.items():
        if name not in TENSORS and value is not None and value != []:
            return f"the argument {name}"
    if reason := _reason_against_config(model, config):
        return reason
    ids = inputs if inputs is not None else rest.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.numel() or ids.dtype not in (torch.int64, torch.int32):
        return "the prompt is not a tensor of token ids (batch, length)"
    cache = rest.get("past_key_values")
    if cache is not None and type(cache) not in (DynamicCache, StaticCache):
        return f"a cache of the kind {type(cache).__name__}"  # it was chosen for how it keeps keys and values
    if cache is not None and int(cache.get_seq_length()):
        return "a cache that is already filled"
    given_eos = config.eos_token_id
    eos = () if given_eos is None else tuple(torch.as_tensor(given_eos).reshape(-1).tolist())
    pad = config.pad_token_id if config.pad_token_id is not None else eos[0] if eos else 0
    rows = _rows(ids, rest.get("attention_mask"), config.pad_token_id, eos)
    if isinstance(rows, str):
        return rows
    new_tokens = _new_tokens(model, config, given, kwargs, ids.shape[1])
    decoder = server.decoder
    strip = decoder.prefix is not None and decoder.prefix.spec.replaces_bos
    if decoder.prefix is not None and strip and any(row[0] != decoder.prefix.spec.tokens[0] for row in rows):
        return "a prompt does not begin with BOS"  # transformers' way says so, too, and what to do
    total = max(len(row) for row in rows) - int(strip) + decoder.prefix_tokens + new_tokens - 1
    if new_tokens < 1 or total > decoder.shape.positions:
        return f"{new_tokens} new tokens, {total} in all, of {decoder.shape.positions} that the loop has positions for"
    return _Request(ids, rows, new_tokens, _sampling(config), eos, pad)


def _reason_against_model(server: Server, model: Any) -> str | None:
    if model.device != server.decoder.cos.device or model.dtype != server.dtype:
        return "the model was moved or cast after serve(); call serve() again"
    if model.training:
        return "the model is in training mode"
    return None


def _reason_against_config(model: Any, config: GenerationConfig) -> str | None:
    """The first setting that the loop does not cover."""
    default = GenerationConfig()
    default.update(**model.generation_config._get_default_generation_params())
    for name, value in vars(config).items():
        usual = getattr(default, name, None)
        if name.startswith("_") or name in COVERED or value == usual or not (value or usual):  # False is None here
            continue
        return f"{name}={value!r}"
    if config.use_cache is False:
        return "use_cache=False"
    if config.cache_implementation not in CACHES:
        return f"cache_implementation={config.cache_implementation!r}"
    return None


def _rows(ids: Tensor, mask: Any, pad: int | None, eos: tuple[int, ...]) -> list[list[int]] | str:
    """The tokens of each row without its padding, or what is wrong with it."""
    rows: list[list[int]] = ids.tolist()
    if mask is None:
        if pad is not None and pad not in eos and any(pad in row for row in rows):
            return "padding without an attention_mask"
        return rows
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return "an attention_mask that is not of the prompt's shape"
    kept = mask.bool()
    if not bool((kept[:, 1:] >= kept[:, :-1]).all()) or not bool(kept[:, -1].all()):
        return "an attention_mask with holes, or with padding on the right"
    return [row[len(row) - count :] for row, count in zip(rows, kept.sum(1).tolist())]


def _new_tokens(
    model: Any, config: GenerationConfig, given: GenerationConfig | None, kwargs: dict[str, Any], length: int
) -> int:
    """How many tokens to write at most, by transformers' rules."""
    if config.max_new_tokens is not None:
        return int(config.max_new_tokens)
    asked = (kwargs.get("max_length"), getattr(given, "max_length", None), model.generation_config.max_length)
    if any(value is not None for value in asked):
        return int(config.max_length) - length
    limit = getattr(model.config, "max_position_embeddings", None)
    whole = int(config.max_length) + length
    return (whole if limit is None else min(whole, int(limit))) - length


def _sampling(config: GenerationConfig) -> Sampling:
    if not config.do_sample:
        return Sampling()
    seed = int(torch.randint(2**62, (1,), device="cpu"))  # follows torch.manual_seed
    temperature = 1.0 if config.temperature is None else float(config.temperature)
    top_p = 1.0 if config.top_p is None else float(config.top_p)
    return Sampling(temperature, int(config.top_k or 0), top_p, seed)
