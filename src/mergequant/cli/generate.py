"""`mergequant generate`: let a model write."""

import sys
import time
from typing import Any

import click
import torch
from transformers import TextStreamer

from mergequant.cli.console import Progress
from mergequant.cli.options import device_option, dtype_option, model_folder, seed_option
from mergequant.errors import UsageError
from mergequant.eval import load_model, load_tokenizer
from mergequant.runtime import KV_BITS

__all__ = ["generate", "prompt_tokens", "write_text"]

DEFAULT_NEW_TOKENS = 100
DEFAULT_TEMPERATURE = 0.8


@click.command(short_help="Let a model write.")
@click.argument("folder", metavar="DIR")
@click.argument("prompt", default="")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), metavar="N", default=DEFAULT_NEW_TOKENS, show_default=True
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    metavar="T",
    default=DEFAULT_TEMPERATURE,
    show_default=True,
    help="0 takes the likeliest token every time.",
)
@seed_option
@device_option
@dtype_option
@click.option(
    "--kv",
    type=click.Choice([str(bits) for bits in KV_BITS]),
    help="Bits of cached keys and values on the fast loop (quantized models, a GPU). Default: 16.",
)
@click.option("--static-cache", is_flag=True, help="Reserve the key/value cache at once.")
def generate(
    folder: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    device: str,
    dtype: torch.dtype | None,
    kv: str | None,
    static_cache: bool,
) -> None:
    """Continue PROMPT with the model in DIR, quantized or float, as it is written. `-` reads PROMPT from stdin.

    A quantized model on a GPU runs on the fast loop: fused kernels, decode steps as a CUDA graph. Where that is not
    possible, a line says why.
    """
    if prompt == "-":
        prompt = sys.stdin.read()
    with Progress() as progress:
        progress.phase("loading")
        place = model_folder(folder)
        tokenizer = load_tokenizer(place)
        model: Any = load_model(place, device, dtype, serve=None, kv_bits=None if kv is None else int(kv))
    tokens = prompt_tokens(tokenizer, prompt)
    started = time.perf_counter()
    count = write_text(model, tokenizer, tokens, max_new_tokens, temperature, seed, static_cache)
    seconds = time.perf_counter() - started
    click.secho(
        f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s with the prompt", dim=True, err=True
    )


def prompt_tokens(tokenizer: Any, prompt: str) -> torch.Tensor:
    """(1, T) int64 ids of a prompt that begins with BOS if the tokenizer has one, whether it adds it itself or not.

    Raises:
        UsageError: there is no token to begin with.
    """
    ids: list[int] = tokenizer(prompt).input_ids
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    if not ids:
        raise UsageError("PROMPT is empty, and this model's tokenizer has no BOS token to begin with; give some text")
    return torch.tensor([ids])


def write_text(
    model: Any,
    tokenizer: Any,
    tokens: torch.Tensor,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    static_cache: bool = False,
) -> int:
    """Write prompt and continuation to stdout, token by token; returns the number of new tokens.

    Raises:
        UsageError: prompt and new tokens are more than the model's positions.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and tokens.shape[1] + max_new_tokens > limit:
        raise UsageError(
            f"the prompt's {tokens.shape[1]} tokens and --max-new-tokens {max_new_tokens} are more than the model's "
            f"{limit} positions; give --max-new-tokens {max(limit - tokens.shape[1], 0)} or less, or a shorter prompt"
        )
    tokens = tokens.to(model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(seed)
    output = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        cache_implementation="static" if static_cache else None,
        **sampling,
    )
    sys.stdout.flush()
    return int(output.shape[1] - tokens.shape[1])
