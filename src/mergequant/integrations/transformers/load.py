"""`load`: a checkpoint folder as a transformers model, with this project's errors."""

import difflib
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from mergequant.checkpoint import open_checkpoint
from mergequant.errors import CheckpointError

__all__ = ["load"]


def load(folder: Path | str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Any:
    """Load a quantized checkpoint for inference.

    Args:
        folder: what `mergequant quantize` or `save_pretrained` wrote.
        dtype: of hidden states, embeddings and head; None takes the one in the config. Scales stay float32.
        device: where the model goes.

    Returns:
        A `PreTrainedModel` with `generate`, in evaluation mode.

    Raises:
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
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", local_files_only=True)
    return model.to(device).eval()


def _folders(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if path.is_dir()] if parent.is_dir() else []
