"""Where the float weights of a model come from: a folder of safetensors, or a model already in memory.

A source hands out one tensor at a time, on the CPU and in the dtype in which it is stored. It never reads more than it
is asked for, so that a model larger than the memory can be walked block by block.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from mergequant.errors import WeightsError

__all__ = ["SafetensorsSource", "StateDictSource", "WeightSource"]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HASH_ALL_BELOW = 1 << 30  # bytes; larger models are fingerprinted by their headers and ends
EDGE = 1 << 20

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class WeightSource(Protocol):
    """Tensors by name. All methods that take a name raise WeightsError when there is no such tensor."""

    def names(self) -> set[str]:
        """Names of all tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor, without reading it."""
        ...

    def get(self, name: str) -> torch.Tensor:
        """The tensor on the CPU in its stored dtype. It may share memory with the source: do not write to it."""
        ...

    def fingerprint(self) -> str:
        """sha256 (hex) that changes when the weights or the config change."""
        ...


class SafetensorsSource:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists.

    All headers are read at once (a few kilobytes each), tensors only when asked for. The index decides where a tensor
    lives: a tensor that a shard holds and the index does not name is ignored, as `transformers` does.

    Raises WeightsError: no safetensors in the folder, a missing, truncated or corrupt shard, an index that is no JSON,
    names a shard outside the folder, or names a tensor that its shard does not hold.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, Any] = {}
        if (self.folder / INDEX).is_file():
            self._shard_of = self._read_index(self.folder / INDEX)
        elif (self.folder / SINGLE).is_file():
            self._check_path(SINGLE)
            self._shard_of = dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        else:
            raise WeightsError(self._nothing_here())
        for shard in self.shards():
            held = set(self._open(shard).keys())
            lost = sorted(name for name, where in self._shard_of.items() if where == shard and name not in held)
            if lost:
                raise WeightsError(
                    f"{self.folder / INDEX} says that {shard} holds {lost[0]!r} ({len(lost)} such tensors), but it "
                    "does not: index and shards come from different saves. Download or save the folder again."
                )

    def shards(self) -> list[str]:
        """File names of the shards, sorted."""
        return sorted(set(self._shard_of.values()))

    def names(self) -> set[str]:
        return set(self._shard_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        stored = self._slice(name).get_dtype()
        if stored not in DTYPES:
            raise WeightsError(
                f"{name} in {self._shard_of[name]} has dtype {stored}, which is not a plain number format."
            )
        return DTYPES[stored]

    def get(self, name: str) -> torch.Tensor:
        self._slice(name)
        try:
            return self._files[self._shard_of[name]].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise WeightsError(self._unreadable(self._shard_of[name], error)) from error

    def fingerprint(self) -> str:
        files = [path for path in [self.folder / "config.json", self.folder / INDEX] if path.is_file()]
        files += [self.folder / shard for shard in self.shards()]
        whole = sum(path.stat().st_size for path in files) < HASH_ALL_BELOW
        digest = hashlib.sha256()
        for path in files:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            for piece in _pieces(path, whole):
                digest.update(piece)
        return digest.hexdigest()

    def _slice(self, name: str) -> Any:
        if name not in self._shard_of:
            raise WeightsError(f"{self.folder} holds no tensor named {name!r}.")
        return self._files[self._shard_of[name]].get_slice(name)

    def _read_index(self, path: Path) -> dict[str, str]:
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(
                f"{path} is not a safetensors index ({error!r}). Download or save the folder again."
            ) from error
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise WeightsError(f"{path}: weight_map must map tensor names to file names. Save the folder again.")
        for shard in sorted(set(weight_map.values())):
            self._check_path(shard)
        return weight_map

    def _check_path(self, shard: str) -> None:
        """A shard is a plain file name in this folder: an index from elsewhere must not make us read other files."""
        if not shard or "\\" in shard or "\0" in shard or Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise WeightsError(
                f"{self.folder / INDEX} names the shard {shard!r}, which may point outside the folder; it is not read. "
                "Only plain names of files in the folder are."
            )
        path = self.folder / shard
        if not path.exists():
            raise WeightsError(f"Shard {shard} is missing from {self.folder}. Download or save the folder again.")
        target, home = path.resolve(), self.folder.resolve()
        # The hub's cache keeps snapshots/<revision>/<file> as links into blobs/: the one link outside that is right.
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
        if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
            raise WeightsError(
                f"Shard {shard} of {self.folder} is a link to {target}, outside the folder; it is not read."
            )

    def _open(self, shard: str) -> Any:
        if shard not in self._files:
            try:
                self._files[shard] = safe_open(str(self.folder / shard), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise WeightsError(self._unreadable(shard, error)) from error
        return self._files[shard]

    def _unreadable(self, shard: str, error: Exception) -> str:
        return (
            f"{self.folder / shard} is truncated or corrupt ({error}). Compare its size with the original and download "
            "or save it again."
        )

    def _nothing_here(self) -> str:
        if any(self.folder.glob("*.bin")) or any(self.folder.glob("*.pt")):
            return (
                f"{self.folder} holds only pickled weights, which can run code when read. Save the model as "
                "safetensors: load it where you trust it and call save_pretrained()."
            )
        return f"{self.folder} holds neither {SINGLE} nor {INDEX}. Point to the folder that save_pretrained() wrote."


class StateDictSource:
    """The tensors of a state dict in memory. They are read, never written.

    `config` is any text that belongs to the weights (the model's config as JSON); it enters the fingerprint.
    """

    def __init__(self, state_dict: Mapping[str, torch.Tensor], config: str = "") -> None:
        self._tensors = {
            name: tensor.detach() for name, tensor in state_dict.items() if isinstance(tensor, torch.Tensor)
        }
        self._config = config
        for name, tensor in self._tensors.items():
            if tensor.is_meta:
                raise WeightsError(
                    f"{name} is on the meta device: its values are offloaded or were never loaded. Give the model's "
                    "folder instead."
                )

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensor(name).shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensor(name).dtype

    def get(self, name: str) -> torch.Tensor:
        return self._tensor(name).to("cpu")

    def fingerprint(self) -> str:
        whole = sum(tensor.nbytes for tensor in self._tensors.values()) < HASH_ALL_BELOW
        digest = hashlib.sha256(self._config.encode())
        for name, tensor in sorted(self._tensors.items()):
            digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
            flat = tensor.reshape(-1)
            edge = max(1, EDGE // flat.element_size())
            for piece in [flat] if whole or flat.numel() <= 2 * edge else [flat[:edge], flat[-edge:]]:
                digest.update(piece.to("cpu").contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _tensor(self, name: str) -> torch.Tensor:
        if name not in self._tensors:
            raise WeightsError(f"The model in memory holds no tensor named {name!r}.")
        return self._tensors[name]


def _pieces(path: Path, whole: bool) -> Iterator[bytes]:
    """Bytes of a file that enter the fingerprint: all, or the safetensors header and the first and last MiB."""
    with path.open("rb") as file:
        if whole or path.suffix != ".safetensors":
            while piece := file.read(EDGE):
                yield piece
            return
        header = file.read(8)
        yield header
        yield file.read(int.from_bytes(header, "little"))
        yield file.read(EDGE)
        file.seek(max(file.tell(), path.stat().st_size - EDGE))
        yield file.read(EDGE)
