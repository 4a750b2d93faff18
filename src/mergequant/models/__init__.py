"""Models of `transformers`: opened without weights, filled block by block, their sites found and proven by a run."""

from mergequant.models.biased_norm import BiasedNorm
from mergequant.models.fold import QueryKeyRows, find_hidden_rows, find_query_key_rows, permute_hidden
from mergequant.models.roles import BlockStructure, NormRole, Producer, RowSlice, Site
from mergequant.models.shell import ModelShell
from mergequant.models.skeleton import model_class, predicts_tokens
from mergequant.models.transform import ModelTransform, OutsideParts

__all__ = [
    "BiasedNorm",
    "BlockStructure",
    "ModelShell",
    "ModelTransform",
    "NormRole",
    "OutsideParts",
    "Producer",
    "QueryKeyRows",
    "RowSlice",
    "Site",
    "find_hidden_rows",
    "find_query_key_rows",
    "model_class",
    "permute_hidden",
    "predicts_tokens",
]
