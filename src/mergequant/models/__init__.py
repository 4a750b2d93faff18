"""Models of `transformers`: opened without weights, filled block by block, their sites found and proven by a run."""

from mergequant.models.roles import BlockStructure, NormRole, Producer, RowSlice, Site
from mergequant.models.shell import ModelShell
from mergequant.models.transform import ModelTransform, OutsideParts

__all__ = [
    "BlockStructure",
    "ModelShell",
    "ModelTransform",
    "NormRole",
    "OutsideParts",
    "Producer",
    "RowSlice",
    "Site",
]
