"""Open a model's config and build its skeleton: modules and buffers, parameters on meta, no cost of an init."""

import copy
import difflib
import importlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from mergequant.errors import ModelError, UsageError

__all__ = ["build_skeleton", "check_config", "local_folder", "model_class", "predicts_tokens", "read_config"]

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def local_folder(model: str | Path) -> Path:
    """The folder of a model: as given, or downloaded when it is no local path but looks like the hub's `org/name`.

    Raises ModelError when there is no such folder, naming near ones beside it.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{path} is a file. Give the folder that holds config.json and the safetensors.")
    if isinstance(model, str) and HUB_NAME.fullmatch(model) and not path.parent.exists():
        return _download(model)
    near: list[str] = []
    if path.parent.is_dir():
        folders = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
        near = difflib.get_close_matches(path.name, folders, n=3)
    hint = f" Did you mean {' or '.join(str(path.parent / name) for name in near)}?" if near else ""
    raise ModelError(
        f"There is no model folder {path}.{hint} A model of the hub is named org/name, or downloaded first."
    )


def read_config(folder: Path) -> PreTrainedConfig:
    """The checked config of a model folder. Code that comes with a model is never run.

    Raises ModelError for a missing or unreadable config, UsageError for a model that cannot be quantized.
    """
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{folder} has no config.json. Give the folder that save_pretrained() wrote.") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be read: {error}. Download or save it again.") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise ModelError(
            f"{folder / 'config.json'} names no model_type, so it is not the config of a transformers model."
        )
    check_config(raw, str(folder))
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the library checks configs by many kinds of errors
        raise ModelError(f"transformers does not accept {folder / 'config.json'}: {error}") from error


def check_config(config: dict[str, Any], name: str) -> None:
    """Raises UsageError for a model that is already quantized, or has both an encoder and a decoder."""
    if config.get("quantization_config"):
        quantization = config["quantization_config"]
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise UsageError(f"{name} is already quantized ({method}). Start from the float model.")
    if config.get("is_encoder_decoder"):
        raise UsageError(
            f"{name} is an encoder-decoder ({config.get('model_type')}). Decoders, and encoders, alone are supported."
        )


def predicts_tokens(config: PreTrainedConfig) -> bool:
    """Whether a folder with this config is opened as a language model, which predicts the next token."""
    return type(config) in AutoModelForCausalLM._model_mapping and getattr(config, "is_decoder", True) is not False


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that a folder with this config is opened with.

    A decoder is opened as a causal LM. A text encoder is opened as the class that its config names (`architectures`,
    which tells its head), or bare when it names none. Raises UsageError for anything else.
    """
    decoders: Any = AutoModelForCausalLM._model_mapping
    bare: Any = AutoModel._model_mapping
    if predicts_tokens(config):
        return _first(decoders[type(config)])
    if type(config) not in bare or not hasattr(config, "vocab_size"):
        raise UsageError(
            f"{config.model_type} is neither a decoder language model nor a text encoder that transformers knows. Give "
            "a model of the Llama, Mistral, Qwen, Gemma, Phi-3, OPT or BERT kind."
        )
    found = _first(bare[type(config)])
    named = (config.architectures or [found.__name__])[0]
    module = importlib.import_module(found.__module__)  # a head stands in the module of the model that it is put on
    chosen = getattr(module, named, None)
    if not isinstance(chosen, type) or not issubclass(chosen, PreTrainedModel):
        raise UsageError(
            f"The config names the architecture {named!r}, which transformers' {config.model_type} does not have. Set "
            f"architectures to [{found.__name__!r}] in config.json to open it without a head."
        )
    return chosen


def _first(found: Any) -> Any:
    return found[0] if isinstance(found, tuple) else found


def build_skeleton(cls: type[PreTrainedModel], config: PreTrainedConfig, folder: Path | None) -> PreTrainedModel:
    """A model in eval mode with its parameters on meta and real buffers; tied parameters are one object.

    Buffers are built in float32, as `from_pretrained` keeps them: a rotary table in bf16 would be a different model.
    Attention is "sdpa" where the class supports it, else "eager"; experts are always "eager". `config` is copied.
    """
    config = copy.deepcopy(config)
    attention = "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"
    try:
        with no_init_weights(), _parameters_on_meta():
            model = cls._from_config(config, dtype=torch.float32, attn_implementation=attention)
    except Exception as error:  # whatever a model class raises for sizes that do not fit together
        raise ModelError(f"{cls.__name__} cannot be built from its config: {error}") from error
    if folder is not None and model.can_generate() and (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:
            raise ModelError(
                f"{folder / 'generation_config.json'} cannot be read: {error}. Repair or delete it."
            ) from error
    if hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"  # proofs run in float64, which grouped products do not
    model.tie_weights()
    return model.eval().requires_grad_(False)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Every parameter that a module registers goes to meta. Storage is reserved for a moment, but not touched."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:  # offline, unknown name, gated, full disk: the library has a kind of error for each
        raise ModelError(
            f"There is no folder {name}, and the hub's model of that name could not be fetched: {error}. "
            "Check the spelling, or download the model first and give its folder."
        ) from error
