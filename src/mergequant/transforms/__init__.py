"""Function-preserving changes and how inputs become codes. Tensors and small dataclasses only."""

from mergequant.transforms.clip import channel_clip_ratios, even_fractions
from mergequant.transforms.kv_steps import kv_error, kv_steps
from mergequant.transforms.scale import activation_aware_scale, clip_groups, smoothing_scale
from mergequant.transforms.schemes import ChannelScheme, FloatScheme, InputScheme, TensorScheme, TokenScheme
from mergequant.transforms.split import drop_slots, split_channels, split_counts

__all__ = [
    "ChannelScheme",
    "FloatScheme",
    "InputScheme",
    "TensorScheme",
    "TokenScheme",
    "activation_aware_scale",
    "channel_clip_ratios",
    "clip_groups",
    "drop_slots",
    "even_fractions",
    "kv_error",
    "kv_steps",
    "smoothing_scale",
    "split_channels",
    "split_counts",
]
