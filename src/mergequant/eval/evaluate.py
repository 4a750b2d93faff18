"""`evaluate`: how good is a quantized model, against the float model that it was made from."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from mergequant.data import (
    DataLike,
    Windows,
    as_data_spec,
    check_seqlen,
    head_windows,
    refuse_overlap,
    sketch,
    sketch_from_json,
)
from mergequant.data.tokenizer import read_tokenizer
from mergequant.data.windows import Bos
from mergequant.errors import InputError, ModelError, UsageError
from mergequant.eval.perplexity import CacheMaker, Scores, score
from mergequant.eval.report import FLOAT_KV_BITS, ModelReport, Report
from mergequant.eval.size import Size, folder_size, memory_size
from mergequant.models import predicts_tokens

__all__ = ["KV_CHOICES", "TaskRunner", "evaluate", "load_model", "load_tokenizer"]

KV_CHOICES = (FLOAT_KV_BITS, 8, 4)
ModelLike = PreTrainedModel | str | Path
TaskRunner = Callable[..., dict[str, dict[str, Any]]]
"""`run_tasks(models, tokenizer, tasks, ...)` of `mergequant.integrations.lm_eval`, or a stand-in."""


def evaluate(
    model: ModelLike,
    against: ModelLike | None = None,
    *,
    data: DataLike,
    samples: int | None = None,
    seqlen: int = 512,
    stride: int | None = None,
    bos: Bos = "auto",
    seed: int = 0,
    tasks: Sequence[str] | str | None = None,
    task_data: str | Path | None = None,
    task_samples: int | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    kv_bits: int = FLOAT_KV_BITS,
) -> Report:
    """Measure perplexity, size and speed of a model, and its distance to the float model.

    model, against: a folder or a loaded model; `against` is the float model, which is run in float32 when given as a
        folder.
    data: as `--data`; the first `samples` windows of `seqlen` tokens from the start of the text (None: all). `self`
        samples them from `against` (or from `model` if that is the float one), with random numbers that calibration
        never uses.
    stride: text tokens between windows, for sliding windows. bos: "auto" puts BOS first if the tokenizer has one.
    tasks: zero-shot tasks of `mergequant.integrations.lm_eval`; task_data: folder with their files;
        task_samples: items per task.
    dtype: of the hidden states of `model` when it is given as a folder (None: as saved, float32 for a float model);
        `against` stays in float32.
    tokenizer: needed for loaded models only, and then only if their `name_or_path` is no folder.
    kv_bits: 16, or 8 or 4 for a `model` that attends through a quantized cache, as it does while it generates.

    Raises `OverlapError`, before anything is computed, when the data overlaps the calibration or held-out data that the
    checkpoint remembers; `UsageError` for an encoder, which predicts no next token; `DataError`, `UsageError`,
    `ModelError` and `NumericsError` as the parts do.
    """
    spec = as_data_spec(data)
    if kv_bits not in KV_CHOICES:
        raise UsageError(f"--kv {kv_bits}: choose one of {', '.join(map(str, KV_CHOICES))}.")
    configs = [_config(model), *([_config(against)] if against is not None else [])]
    for config in configs:
        _require_next_token(config)
    check_seqlen(seqlen, min((n for c in configs if (n := _max_positions(c)) is not None), default=None))
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(model)
    names = [tasks] if isinstance(tasks, str) else list(tasks or ())
    names = [name.strip() for entry in names for name in entry.split(",") if name.strip()]
    if names and kv_bits != FLOAT_KV_BITS:
        raise UsageError(f"--tasks are run without a quantized cache; leave out --kv {kv_bits}, or measure them apart.")
    run_tasks = _task_runner() if names else None  # a missing library should not show after an hour of work

    loaded_float: PreTrainedModel | None = None
    if spec.needs_model:
        if against is None and _is_quantized(configs[0]):
            raise UsageError(
                "--data self samples text from the float model; give it with --against MODEL, or give a text file."
            )
        loaded_float = load_model(model, device, dtype) if against is None else load_model(against, device)
    windows = head_windows(
        spec, tokenizer, samples=samples, seqlen=seqlen, bos=bos, stride=stride, model=loaded_float, seed=seed
    )
    overlap_checked = _refuse_overlap(windows, _quantization(configs[0]))

    if against is None:
        scored = loaded_float if loaded_float is not None else load_model(model, device, dtype)
        exact = None
    else:
        scored = load_model(model, device, dtype)
        exact = loaded_float if loaded_float is not None else load_model(against, device)
    new_cache = None if kv_bits == FLOAT_KV_BITS else _cache_maker(scored, kv_bits)
    scores = score(scored, windows, batch_size=batch_size, against=exact, device=device, new_cache=new_cache)

    task_results: dict[str, dict[str, Any]] = {}
    if run_tasks is not None:
        first = "quantized" if exact is not None or _is_quantized(configs[0]) else "float"
        models = {first: scored} | ({"float": exact} if exact is not None else {})
        task_results = run_tasks(
            models, tokenizer, names, task_data=task_data, limit=task_samples, batch_size=batch_size, seed=seed
        )
    protocol = {
        "data": windows.source,
        "samples": len(windows),
        "seqlen": seqlen,
        "stride": windows.stride,
        "bos": windows.begins_with_bos,
        "seed": seed,
        "predicted_tokens": scores.model.tokens,
        "windows_fingerprint": windows.fingerprint,
        "overlap_checked": overlap_checked,
        "batch_size": batch_size,
        "device": str(scored.device),
        "dtype": str(scored.dtype).removeprefix("torch."),
        "kv_bits": kv_bits,
        "float_dtype": None if exact is None else str(exact.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }
    sizes = [_size(model, scored, configs[0])]
    if against is not None and exact is not None:
        sizes.append(_size(against, exact, configs[1]))
    return _report(scores, sizes, _is_quantized(configs[0]), protocol, task_results)


def _report(
    scores: Scores, sizes: Sequence[Size], quantized: bool, protocol: Mapping[str, Any], tasks: Mapping[str, Any]
) -> Report:
    first = ModelReport(scores.model, sizes[0])
    if scores.against is not None:
        return Report(first, ModelReport(scores.against, sizes[1]), scores.divergence, protocol, tasks)
    return Report(first if quantized else None, None if quantized else first, None, protocol, tasks)


def _refuse_overlap(windows: Windows, quantization: Mapping[str, Any]) -> bool:
    """Compare with what the checkpoint remembers; says whether there was anything to compare with."""
    provenance = quantization.get("provenance") or {}
    checked = False
    for key, name in (("calibration_sketch", "calibration"), ("held_out_sketch", "held-out")):
        if stored := provenance.get(key):
            known = sketch_from_json(stored)
            refuse_overlap("evaluation", sketch(windows.tokens, ngram=known.ngram), name, known)
            checked = checked or windows.seqlen >= known.ngram
    return checked


def _folder(model: ModelLike) -> Path | None:
    """The folder that a model was given as, or was loaded from."""
    path = Path(str(model.name_or_path) if isinstance(model, PreTrainedModel) else model)
    return path if (path / "config.json").is_file() else None


def _need_folder(model: ModelLike) -> Path:
    folder = _folder(model)
    if folder is None:
        path = Path(str(model))
        why = "it has no config.json" if path.is_dir() else "there is no such folder"
        raise ModelError(f"Model {str(path)!r}: {why}; give a folder in the format of transformers.")
    return folder


def _stored_config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / "config.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"Model {str(folder)!r}: config.json cannot be read ({error}).") from error


def _config(model: ModelLike) -> Any:
    """The `transformers` config of a model that may not be loaded yet."""
    if isinstance(model, PreTrainedModel):
        return model.config
    folder = _need_folder(model)
    _stored_config(folder)
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"Model {str(folder)!r}: config.json is not one that transformers knows ({error}).") from error


def _require_next_token(config: Any) -> None:
    """Refuse an encoder, with the figures that there are for it."""
    if predicts_tokens(config):
        return
    named = (config.architectures or [type(config).__name__])[0]
    figures = (_quantization(config).get("figures") or {}).get("held_out") or {}
    errors = [f"{key.removesuffix('_error')} {value:.2%}" for key, value in figures.items() if key.endswith("_error")]
    known = f" On held-out windows its relative errors were: {', '.join(errors)}." if errors else ""
    raise UsageError(
        f"{named} predicts no next token: it cannot write, and perplexity, KL divergence and zero-shot tasks say "
        f"nothing about it.{known} What quantizing costs it is measured while it is quantized (README.md of the "
        "checkpoint); to know more, run its own task on both models: mergequant.load(DIR) gives a transformers model."
    )


def _max_positions(config: Any) -> int | None:
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _quantization(config: Any) -> Mapping[str, Any]:
    """`quantization_config` as a mapping, empty for a float model."""
    value = getattr(config, "quantization_config", None) or {}
    return value if isinstance(value, Mapping) else value.to_dict()


def _is_quantized(config: Any) -> bool:
    return bool(_quantization(config))


def load_model(
    model: ModelLike,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    serve: bool | None = False,
    kv_bits: int | None = None,
) -> PreTrainedModel:
    """A quantized or float model from a folder, in evaluation mode; a model in memory is returned as it is.

    dtype: None takes the saved one for a quantized folder, float32 for a float one. serve, kv_bits: as
    `mergequant.load`, for quantized folders; scoring runs forward passes, which need neither. Raises `ModelError`,
    `CheckpointError`, and `UsageError`, also for an encoder: who asks here wants a model that writes.
    """
    if isinstance(model, PreTrainedModel):
        return model
    folder = _need_folder(model)
    _require_next_token(_config(model))
    if _is_quantized(_config(model)):
        import mergequant  # here, because the public face itself exports `evaluate`

        return mergequant.load(folder, dtype=dtype, device=device or "cpu", serve=serve, kv_bits=kv_bits)
    if kv_bits is not None:
        raise UsageError(f"--kv {kv_bits} is for quantized models; {folder} holds a float one.")
    try:
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or torch.float32)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(f"Model {str(folder)!r}: cannot be loaded ({type(error).__name__}: {error}).") from error
    if device is not None:
        torch.nn.Module.to(loaded, device)
    return loaded.eval()


def load_tokenizer(model: ModelLike) -> PreTrainedTokenizerBase:
    """Tokenizer of the folder that a model was given as, or was loaded from. Raises `UsageError`, `ModelError`."""
    folder = _folder(model)
    if folder is None:
        raise UsageError("The model was not loaded from a folder, so its tokenizer is unknown; pass tokenizer=...")
    return read_tokenizer(folder)


def _size(given: ModelLike, loaded: PreTrainedModel, config: Any) -> Size:
    """Size on disk if the folder holds this very model, else size in memory.

    A model that was quantized in memory still names the float folder as its origin; that folder's size is not its own.
    """
    folder = _folder(given)
    if folder is not None and ("quantization_config" in _stored_config(folder)) == _is_quantized(config):
        return folder_size(folder, config)
    return memory_size(loaded, config)


def _cache_maker(model: PreTrainedModel, bits: int) -> CacheMaker:
    """What makes a quantized cache. Raises `UsageError` at once for a model that has no steps for it."""
    from mergequant.integrations.transformers import QuantizedCache  # the same door as below

    try:
        QuantizedCache.for_model(model, bits)
    except InputError as error:
        raise UsageError(f"--kv {bits}: {error}.") from error
    return lambda model: QuantizedCache.for_model(model, bits)


def _task_runner() -> TaskRunner:
    # Integrations stand beside this room; the one door to them is opened only for callers who ask for tasks.
    from mergequant.integrations.lm_eval import require_lm_eval, run_tasks

    require_lm_eval()
    return run_tasks
