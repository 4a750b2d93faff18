"""Function-preserving changes and how inputs become codes. Tensors and small dataclasses only."""

from mergequant.transforms.cayley import cayley_step, nearest_orthogonal
from mergequant.transforms.clip import channel_clip_ratios, even_fractions
from mergequant.transforms.kronecker import Kronecker, factor_sizes
from mergequant.transforms.kv_steps import kv_error, kv_steps
from mergequant.transforms.reassemble import Distance, Reassembly, disassemblies, merge_distance, merge_groups
from mergequant.transforms.scale import activation_aware_scale, clip_groups, smoothing_scale, threshold_scale
from mergequant.transforms.schemes import (
    ChannelScheme,
    FloatScheme,
    InputScheme,
    ReassembledScheme,
    TensorScheme,
    TokenScheme,
)
from mergequant.transforms.shift import middles, without_small
from mergequant.transforms.split import drop_slots, split_channels, split_counts

__all__ = [
    "ChannelScheme",
    "Distance",
    "FloatScheme",
    "InputScheme",
    "Kronecker",
    "ReassembledScheme",
    "Reassembly",
    "TensorScheme",
    "TokenScheme",
    "activation_aware_scale",
    "cayley_step",
    "channel_clip_ratios",
    "clip_groups",
    "disassemblies",
    "drop_slots",
    "even_fractions",
    "factor_sizes",
    "kv_error",
    "kv_steps",
    "merge_distance",
    "merge_groups",
    "middles",
    "nearest_orthogonal",
    "smoothing_scale",
    "split_channels",
    "split_counts",
    "threshold_scale",
    "without_small",
]
