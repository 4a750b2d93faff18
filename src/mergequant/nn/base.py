"""What all quantized modules share: float32 constants survive `.half()` and `.to(dtype)`."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["QuantModule"]


class QuantModule(nn.Module):
    """A module whose buffers keep their dtype when the model is cast, while its outputs follow the cast.

    Scales and multipliers in 16 bits would change the codes; casting a quantized model therefore moves them between
    devices but never rounds them. `out_dtype` is the dtype of float results and follows `.to(dtype)`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.out_dtype = torch.get_default_dtype()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        self.out_dtype = fn(torch.empty(0, dtype=self.out_dtype, device="cpu")).dtype
        return self
