"""Models of `transformers`: opened without weights, filled block by block, their sites found and proven by a run."""

from mergequant.models.roles import BlockStructure, NormRole, Producer, RowSlice, Site
from mergequant.models.shell import ModelShell

__all__ = ["BlockStructure", "ModelShell", "NormRole", "Producer", "RowSlice", "Site"]
