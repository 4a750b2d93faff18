"""Text and tokens for calibration, held-out choices and evaluation."""

from mergequant.data.overlap import Sketch, overlap, refuse_overlap, sketch, sketch_from_json, sketch_to_json
from mergequant.data.sampling import sample_windows
from mergequant.data.spec import DataLike, DataSpec, as_data_spec, parse_data
from mergequant.data.windows import Windows, check_seqlen, draw_splits, draw_windows, head_windows

__all__ = [
    "DataLike",
    "DataSpec",
    "Sketch",
    "Windows",
    "as_data_spec",
    "check_seqlen",
    "draw_splits",
    "draw_windows",
    "head_windows",
    "overlap",
    "parse_data",
    "refuse_overlap",
    "sample_windows",
    "sketch",
    "sketch_from_json",
    "sketch_to_json",
]
