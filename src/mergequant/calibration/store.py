"""Activations that wait their turn: on the device while they fit, then in memory, then on disk."""

import shutil
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["ActivationStore", "StorePolicy"]


@dataclass(frozen=True)
class StorePolicy:
    """Where activations may lie.

    Attributes:
        device: the device that computes.
        device_bytes: bytes one store may keep on a device that is not the CPU.
        memory_bytes: bytes one store may keep in memory beyond that; the rest goes to disk.
        folder: folder for what spills; None = the system's temporary folder.
    """

    device: torch.device
    device_bytes: int = 8 << 30
    memory_bytes: int = 4 << 30
    folder: Path | None = None


class ActivationStore:
    """A list of tensors with bounded memory. Reading gives tensors on the computing device, in order."""

    def __init__(self, policy: StorePolicy) -> None:
        self._policy = policy
        self._entries: list[Tensor | Path] = []
        self._on_device = 0
        self._in_memory = 0
        self._spill: Path | None = None
        self._remove: weakref.finalize[..., ActivationStore] | None = None

    def append(self, value: Tensor) -> None:
        """Add a tensor at the end."""
        self._entries.append(self._place(value.detach(), len(self._entries)))

    def replace(self, position: int, value: Tensor) -> None:
        """Put another tensor of the same size at a position; it stays where the old one lay."""
        old = self._entries[position]
        if isinstance(old, Path):
            save_file({"value": value.detach().cpu().contiguous()}, old)
        else:
            self._entries[position] = value.detach().to(old.device)

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, position: int) -> Tensor:
        entry = self._entries[position]
        if isinstance(entry, Path):
            return load_file(entry, device=str(self._policy.device))["value"]
        return entry.to(self._policy.device)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[position] for position in range(len(self)))

    def close(self) -> None:
        """Forget everything and remove what was spilled."""
        self._entries.clear()
        if self._remove is not None:
            self._remove()
        self._spill = self._remove = None

    def _place(self, value: Tensor, position: int) -> Tensor | Path:
        size = value.numel() * value.element_size()
        if self._policy.device.type != "cpu" and self._on_device + size <= self._policy.device_bytes:
            self._on_device += size
            return value
        if self._in_memory + size <= self._policy.memory_bytes:
            self._in_memory += size
            return value.cpu()
        if self._spill is None:
            self._spill = Path(mkdtemp(prefix="mergequant-activations-", dir=self._policy.folder))
            # Also when nobody comes to `close`: an error or Ctrl-C must not leave gigabytes behind.
            self._remove = weakref.finalize(self, shutil.rmtree, self._spill, ignore_errors=True)
        path = self._spill / f"{position:06d}.safetensors"
        save_file({"value": value.cpu().contiguous()}, path)
        return path
