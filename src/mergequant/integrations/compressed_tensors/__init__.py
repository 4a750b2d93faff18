"""Checkpoints in the layout of compressed-tensors, which an unmodified vLLM serves; see `export`.

The library itself (the extra `dev`) is needed by nothing here: tests load what is written with it.
"""

from mergequant.integrations.compressed_tensors.export import FORMATS, Exported, export

__all__ = ["FORMATS", "Exported", "export"]
