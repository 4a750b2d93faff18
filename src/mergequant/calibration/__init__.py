"""Calibration: activations of all windows, carried through the model block by block."""

from mergequant.calibration.chain import Chain, Chunk, Prefix, Role, check_finite, chunked
from mergequant.calibration.context import BlockContext, SiteContext, mix_values
from mergequant.calibration.kv import record_kv
from mergequant.calibration.store import ActivationStore, StorePolicy

__all__ = [
    "ActivationStore",
    "BlockContext",
    "Chain",
    "Chunk",
    "Prefix",
    "Role",
    "SiteContext",
    "StorePolicy",
    "check_finite",
    "chunked",
    "mix_values",
    "record_kv",
]
