"""Number grids, granularity and packing: the ground floor. Knows torch only."""

from mergequant.grids.integer import IntegerGrid
from mergequant.grids.packing import container_bits, pack_codes, packed_width, unpack_codes
from mergequant.grids.quantizer import AbsMax, ClipSearch, QTensor, Quantizer, fitting_group
from mergequant.grids.two_level import TwoLevelQuantizer, TwoLevelTensor

__all__ = [
    "AbsMax",
    "ClipSearch",
    "IntegerGrid",
    "QTensor",
    "Quantizer",
    "TwoLevelQuantizer",
    "TwoLevelTensor",
    "container_bits",
    "fitting_group",
    "pack_codes",
    "packed_width",
    "unpack_codes",
]
