"""Tiny random models of many families, for tests. Sizes are odd on purpose: no power of two divides them by luck.

`FAMILIES` are decoders, `ENCODERS` models that read a whole text at once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

COMMON = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {
    "vocab_size": 97,
    "hidden_size": 40,
    "ffn_dim": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 40,
}
BERT = {
    "vocab_size": 97,
    "hidden_size": 40,
    "intermediate_size": 52,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_labels": 3,
}


def _family(
    config: type[PreTrainedConfig], common: dict[str, Any] = COMMON, **own: Any
) -> Callable[[], PreTrainedConfig]:
    return lambda: config(**{**common, **own})


FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": _family(hf.LlamaConfig),
    "llama_tied_wide_heads": _family(hf.LlamaConfig, head_dim=14, tie_word_embeddings=True, attention_bias=True),
    "llama_no_gqa": _family(hf.LlamaConfig, num_key_value_heads=4, hidden_size=36, head_dim=10, mlp_bias=True),
    "mistral": _family(hf.MistralConfig, sliding_window=6),
    "qwen2": _family(hf.Qwen2Config, tie_word_embeddings=True),
    "qwen3": _family(hf.Qwen3Config, head_dim=12),
    "gemma": _family(hf.GemmaConfig, head_dim=12, num_key_value_heads=1, tie_word_embeddings=True),
    "gemma2": _family(
        hf.Gemma2Config, head_dim=12, sliding_window=6, query_pre_attn_scalar=12, tie_word_embeddings=True
    ),
    "phi3": _family(hf.Phi3Config),
    "opt": _family(hf.OPTConfig, OPT),
    "opt_gelu_projected": _family(hf.OPTConfig, OPT, activation_function="gelu", word_embed_proj_dim=24),
}
# Not decoders: no next token, no cache, no BOS; with the class that opens them.
ENCODERS: dict[str, tuple[Any, Callable[[], PreTrainedConfig]]] = {
    "bert": (AutoModel, _family(hf.BertConfig, BERT)),
    "bert_classifier": (AutoModelForSequenceClassification, _family(hf.BertConfig, BERT, hidden_act="relu")),
}


def make_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model with random weights of sensible size.

    Gains and biases scatter around where transformers starts them, which is 1 (0 for Gemma, which adds 1) and 0:
    untouched, they would hide a forgotten gain or bias.
    """
    opened_by, config = ENCODERS[family] if family in ENCODERS else (AutoModelForCausalLM, FAMILIES[family])
    model = opened_by.from_config(config(), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(0.2 * noise)
    return model.to(dtype).eval()


def save_model(family: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """Save `make_model(...)` and return the folder. `options` go to save_pretrained (max_shard_size, ...)."""
    make_model(family, seed, dtype).save_pretrained(folder, **options)
    return folder
