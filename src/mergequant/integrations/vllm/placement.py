"""Where the tensors of a checkpoint go: each into the module that waits for it, and none is lost.

vLLM's loader hands over every tensor of the files, whole, on every GPU. What is quantized has a place here, with the
rows that this GPU keeps; everything else goes on to vLLM's own names.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant.errors import CheckpointError

__all__ = ["Place", "Placement"]

SHOWN = 4  # names listed in a message


@dataclass(frozen=True, eq=False)
class Place:
    """A buffer, and what it takes of a stored tensor.

    Attributes:
        buffer: receives the values.
        dtype, shape: of the tensor as it is stored.
        axis: along which a part is taken; None takes all.
        start: first index of the part, which is as long as the buffer.
    """

    buffer: Tensor
    dtype: torch.dtype
    shape: tuple[int, ...]
    axis: int | None = None
    start: int = 0


class Placement:
    """All places of a model on one GPU, by the stored tensors' full names."""

    def __init__(self) -> None:
        self.places: dict[str, Place | None] = {}
        self.filled: set[str] = set()

    def add(self, name: str, place: Place | None) -> None:
        """A tensor with a place; None: it is known, and has no use here."""
        self.places[name] = place

    def take(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Copy what has a place, and pass on the rest.

        Raises:
            CheckpointError: a tensor of another dtype or shape than its description says.
        """
        for name, value in weights:
            if name not in self.places:
                yield name, value
                continue
            place = self.places[name]
            if place is not None:
                _fill(name, place, value)
            self.filled.add(name)

    def require_all(self) -> None:
        """Raise CheckpointError where a tensor did not come."""
        if missing := sorted(set(self.places) - self.filled):
            more = "" if len(missing) <= SHOWN else f" and {len(missing) - SHOWN} more"
            raise CheckpointError(
                f"missing tensors {', '.join(missing[:SHOWN])}{more}; fetch or write the checkpoint again"
            )


def _fill(name: str, place: Place, value: Tensor) -> None:
    if value.dtype != place.dtype or tuple(value.shape) != place.shape:
        raise CheckpointError(
            f"{name}: is {value.dtype} {tuple(value.shape)}, its description needs {place.dtype} {place.shape}; fetch "
            "or write the checkpoint again"
        )
    part = value if place.axis is None else value.narrow(place.axis, place.start, place.buffer.shape[place.axis])
    place.buffer.copy_(part)
