"""MergeQuantConfig: the `quantization_config` of a checkpoint as transformers carries it, kept whole."""

import copy
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from mergequant.checkpoint import QUANT_METHOD, Quantization

__all__ = ["MergeQuantConfig"]


class MergeQuantConfig(QuantizationConfigMixin):
    """Holds the dict unchanged, so that `save_pretrained` of a loaded model writes an equal config."""

    def __init__(self, **data: Any) -> None:
        self.quant_method: Any = QUANT_METHOD
        self.data = copy.deepcopy({**data, "quant_method": QUANT_METHOD})

    @property
    def quantization(self) -> Quantization:
        """The parsed config.

        Raises:
            CheckpointError: as `Quantization.from_dict`.
        """
        return Quantization.from_dict(self.data)

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready dict."""
        return copy.deepcopy(self.data)
