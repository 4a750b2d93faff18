"""The bundled default model: a 6.5 M parameter Llama trained for this project (see `docs/bundled-model.md`)."""

from pathlib import Path

__all__ = ["TINY"]

TINY = Path(__file__).parent / "tiny"
