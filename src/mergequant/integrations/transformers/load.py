"""`load`: a checkpoint folder as a transformers model, with this project's errors; on a GPU, on the fast loop."""

import difflib
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from mergequant.checkpoint import open_checkpoint
from mergequant.errors import CheckpointError, UsageError
from mergequant.integrations.transformers.serve import serve as serve_model
from mergequant.models import model_class

__all__ = ["load"]

LOG = logging.getLogger("mergequant")
DEFAULT_KV_BITS = 16
LEAST_CAPABILITY = (8, 0)  # of a GPU that the fast loop's kernels run on


def load(
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    serve: bool | None = None,
    kv_bits: int | None = None,
) -> Any:
    """Load a quantized checkpoint for inference.

    Args:
        folder: what `mergequant quantize` or `save_pretrained` wrote.
        dtype: of hidden states, embeddings and head; None takes the one in the config. Scales stay float32.
        device: where the model goes.
        serve: put `generate` on the fast loop (see `serve`). None: on a GPU; if the loop cannot run the model or has
            no kernels for it, a warning of the logger `mergequant` says why, and transformers' way stays.
        kv_bits: of the fast loop's cache: 16, 8 or 4. Giving it means serve=True; None: 16.

    Returns:
        A `PreTrainedModel` in evaluation mode: with `generate`, or an encoder of the class that its config names.

    Raises:
        UsageError: the fast loop was asked for and cannot run the model.
        VersionError: an unknown major version of the format.
        CheckpointError: the folder is missing, not ours, or breaks a rule of the format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        near = difflib.get_close_matches(folder.name, _folders(folder.parent), n=3)
        hint = f"did you mean {', '.join(repr(str(folder.with_name(name))) for name in near)}?" if near else ""
        raise CheckpointError(
            f"{folder}: there is no such folder; {hint or 'pass the folder that `mergequant quantize` wrote'}"
        )
    open_checkpoint(folder).names()  # reads the headers, before transformers meets a damaged one
    made_by: Any = model_class(AutoConfig.from_pretrained(folder, local_files_only=True))
    model = made_by.from_pretrained(folder, dtype=dtype or "auto", local_files_only=True)
    model = model.to(device).eval()
    if serve or (serve is None and kv_bits is not None):
        serve_model(model, kv_bits or DEFAULT_KV_BITS)
    elif serve is None and model.device.type == "cuda" and model.can_generate():
        try:
            _require_kernels(model)
            serve_model(model)
        except UsageError as error:
            LOG.warning("generate stays on transformers: %s", error)
    return model


def _require_kernels(model: Any) -> None:
    """The fast loop runs anywhere, but is fast only where its kernels are."""
    if torch.cuda.get_device_capability(model.device) < LEAST_CAPABILITY:
        raise UsageError(
            f"the kernels want a GPU of compute capability {'.'.join(map(str, LEAST_CAPABILITY))} or newer"
        )
    if model.dtype not in (torch.bfloat16, torch.float16):
        raise UsageError(f"the kernels compute in bfloat16 and float16, the model in {model.dtype}")


def _folders(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
