"""Quantized checkpoints on disk: written block by block, read lazily, checked strictly (`docs/format.md`)."""

from mergequant.checkpoint.card import model_card
from mergequant.checkpoint.format import (
    FORMAT_VERSION,
    KV_MODULE,
    PREFIX_MODULE,
    QUANT_METHOD,
    Quantization,
    expected_tensors,
)
from mergequant.checkpoint.reader import Checkpoint, open_checkpoint
from mergequant.checkpoint.size import count_bits
from mergequant.checkpoint.writer import CheckpointWriter, check_place

__all__ = [
    "FORMAT_VERSION",
    "KV_MODULE",
    "PREFIX_MODULE",
    "QUANT_METHOD",
    "Checkpoint",
    "CheckpointWriter",
    "Quantization",
    "check_place",
    "count_bits",
    "expected_tensors",
    "model_card",
    "open_checkpoint",
]
