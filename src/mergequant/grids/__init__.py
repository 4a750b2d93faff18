"""Number grids, granularity and packing: the ground floor. Knows torch only."""

from mergequant.grids.across import AcrossTensor, encode_across
from mergequant.grids.bitstream import pack_stream, stream_width, unpack_stream
from mergequant.grids.codebook import CodebookTensor, CodedColumns, decode_columns, pack_indices, unpack_indices
from mergequant.grids.integer import IntegerGrid
from mergequant.grids.outliers import Outliers
from mergequant.grids.packing import container_bits, pack_codes, packed_width, unpack_codes
from mergequant.grids.power import PowerGrid
from mergequant.grids.quantizer import AbsMax, ClipSearch, QTensor, Quantizer, ZeroTensor, fitting_group
from mergequant.grids.second_level import SecondLevel
from mergequant.grids.sparse import SparseTensor
from mergequant.grids.two_level import TwoLevelQuantizer, TwoLevelTensor

__all__ = [
    "AbsMax",
    "AcrossTensor",
    "ClipSearch",
    "CodebookTensor",
    "CodedColumns",
    "IntegerGrid",
    "Outliers",
    "PowerGrid",
    "QTensor",
    "Quantizer",
    "SecondLevel",
    "SparseTensor",
    "TwoLevelQuantizer",
    "TwoLevelTensor",
    "ZeroTensor",
    "container_bits",
    "decode_columns",
    "encode_across",
    "fitting_group",
    "pack_codes",
    "pack_indices",
    "pack_stream",
    "packed_width",
    "stream_width",
    "unpack_codes",
    "unpack_indices",
    "unpack_stream",
]
