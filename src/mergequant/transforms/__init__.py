"""Function-preserving changes and how inputs become codes. Tensors and small dataclasses only."""

from mergequant.transforms.clip import channel_clip_ratios, even_fractions
from mergequant.transforms.kv_steps import kv_error, kv_steps
from mergequant.transforms.schemes import ChannelScheme, FloatScheme, InputScheme, TensorScheme, TokenScheme
from mergequant.transforms.split import drop_slots, split_channels, split_counts

__all__ = [
    "ChannelScheme",
    "FloatScheme",
    "InputScheme",
    "TensorScheme",
    "TokenScheme",
    "channel_clip_ratios",
    "drop_slots",
    "even_fractions",
    "kv_error",
    "kv_steps",
    "split_channels",
    "split_counts",
]
