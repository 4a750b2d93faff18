"""The grammar of `--data`: where text comes from.

    DATA   = PART ("+" PART)*             parts of equal weight unless a weight is given
    PART   = SOURCE ["*" WEIGHT]          WEIGHT is a positive number; weights are relative
    SOURCE = "self"                       sequences sampled from the float model itself
           | "hf:" NAME [":" CONFIG] [":" SPLIT]
           | PATH                         .txt, .jsonl or .parquet, or a folder of those

A name that exists on disk is always a path, so file names may hold `+`, `*` and `:`. After `hf:NAME:` a single further
word is a split if it looks like one (`train`, `test[:10%]`, ...) and a config otherwise; `hf:NAME::SPLIT` is clear.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mergequant.errors import DataError, UsageError

__all__ = ["DataLike", "DataSpec", "HubSource", "Part", "PathSource", "SelfSource", "Source", "TextSource"]
__all__ += ["TokenSource", "as_data_spec", "parse_data"]

SUFFIXES = (".txt", ".jsonl", ".parquet")
SPLITS = ("train", "validation", "valid", "val", "dev", "test")


@dataclass(frozen=True)
class SelfSource:
    """Sequences sampled from the float model; needs no download and no file."""

    def __str__(self) -> str:
        return "self"


@dataclass(frozen=True)
class PathSource:
    """A `.txt`, `.jsonl` or `.parquet` file, or a folder of those."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True)
class HubSource:
    """A data set of the Hugging Face hub, streamed through `datasets`."""

    name: str
    config: str | None = None
    split: str = "train"

    def __str__(self) -> str:
        return f"hf:{self.name}:{self.config or ''}:{self.split}"


@dataclass(frozen=True)
class TextSource:
    """Texts handed over by a Python caller; each is one document."""

    texts: tuple[str, ...]

    def __str__(self) -> str:
        return f"<{len(self.texts)} texts>"


@dataclass(frozen=True, eq=False)
class TokenSource:
    """Ready windows of token ids handed over by a Python caller, (N, T) int64."""

    tokens: torch.Tensor

    def __str__(self) -> str:
        return f"<{self.tokens.shape[0]} windows of {self.tokens.shape[1]} tokens>"


Source = SelfSource | PathSource | HubSource | TextSource | TokenSource


@dataclass(frozen=True)
class Part:
    """One source and its relative weight in a mix."""

    source: Source
    weight: float = 1.0


@dataclass(frozen=True)
class DataSpec:
    """A parsed `--data` value. `str(spec)` parses back to an equal spec (except for data handed over in memory)."""

    parts: tuple[Part, ...]

    def __str__(self) -> str:
        if len(self.parts) == 1:
            return str(self.parts[0].source)
        return "+".join(f"{part.source}*{part.weight!r}" for part in self.parts)

    @property
    def needs_model(self) -> bool:
        """Whether a float model is needed to produce the tokens."""
        return any(isinstance(part.source, SelfSource) for part in self.parts)

    def share(self, samples: int) -> list[int]:
        """Split a number of windows over the parts in proportion to their weights (largest remainder)."""
        total = sum(part.weight for part in self.parts)
        exact = [samples * part.weight / total for part in self.parts]
        counts = [math.floor(x) for x in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
        for i in by_remainder[: samples - sum(counts)]:
            counts[i] += 1
        return counts


DataLike = str | Path | Sequence[str] | torch.Tensor | DataSpec


def as_data_spec(data: DataLike) -> DataSpec:
    """Accept everything that a Python caller may pass as `data`.

    Takes a `--data` string, a path, a list of texts, an (N, T) integer tensor of ready windows, or a parsed spec.
    Raises `UsageError` for another type or shape, and what `parse_data` raises.
    """
    if isinstance(data, DataSpec):
        return data
    if isinstance(data, str):
        return parse_data(data)
    if isinstance(data, Path):
        return DataSpec((Part(_path_source(str(data))),))
    if isinstance(data, torch.Tensor):
        if data.ndim != 2 or data.dtype != torch.int64:
            raise UsageError(
                f"data: a tensor of windows must be (N, T) int64, this one is {tuple(data.shape)} {data.dtype}."
            )
        return DataSpec((Part(TokenSource(data.detach().cpu())),))
    if isinstance(data, Sequence) and all(isinstance(text, str) for text in data):
        return DataSpec((Part(TextSource(tuple(data))),))
    raise UsageError(
        f"data: cannot use a {type(data).__name__}; pass a --data string, a path, a list of str, "
        "or an (N, T) int64 tensor."
    )


def parse_data(spec: str) -> DataSpec:
    """Parse a `--data` string by the grammar of this module.

    Raises `UsageError` for a malformed spec and `DataError` for a path that does not exist or is of an unknown kind;
    the message names near misses.
    """
    if not spec.strip():
        raise UsageError("--data is empty; give `self`, a .txt/.jsonl/.parquet path, or hf:NAME[:CONFIG][:SPLIT].")
    if spec != "self" and Path(spec).exists():
        return DataSpec((Part(_path_source(spec)),))
    return DataSpec(tuple(_parse_part(text.strip(), spec) for text in spec.split("+")))


def _parse_part(text: str, whole: str) -> Part:
    weight = 1.0
    if "*" in text and not Path(text).exists():
        text, _, number = text.rpartition("*")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not (weight > 0 and math.isfinite(weight)):
            raise UsageError(f"--data {whole!r}: weight {number!r} is not a positive number; write e.g. `self*0.5`.")
    text = text.strip()
    if not text:
        raise UsageError(f"--data {whole!r}: a part of the mix is empty; write e.g. `self*0.5+notes.txt*0.5`.")
    if text == "self":
        return Part(SelfSource(), weight)
    if text.startswith("hf:"):
        return Part(_hub_source(text), weight)
    return Part(_path_source(text), weight)


def _hub_source(text: str) -> HubSource:
    # A slice such as train[:10%] holds a colon itself, so cut only outside of brackets.
    head, bracket, tail = text.removeprefix("hf:").partition("[")
    fields = head.split(":")
    fields[-1] += bracket + tail
    if not fields[0] or len(fields) > 3:
        raise UsageError(f"--data {text!r}: expected hf:NAME[:CONFIG][:SPLIT].")
    name, config, split = (*fields, "", "")[:3]
    if len(fields) == 2 and config.partition("[")[0].lower() in SPLITS:
        config, split = "", config
    return HubSource(name, config or None, split or "train")


def _path_source(text: str) -> PathSource:
    path = Path(text)
    if not path.exists():
        raise DataError(f"data {text!r}: no such file or folder{_near(path)}.")
    if path.is_file() and path.suffix.lower() not in SUFFIXES:
        raise DataError(
            f"data {text!r}: cannot read {path.suffix or 'a file without suffix'}; use {', '.join(SUFFIXES)}."
        )
    return PathSource(path)


def _near(path: Path) -> str:
    """Suggestion for a misspelt path: `self`, or a readable neighbour with a similar name."""
    folder = path.parent
    names = [] if not folder.is_dir() else [p.name for p in folder.iterdir() if p.is_dir() or p.suffix in SUFFIXES]
    words = names + (["self"] if str(folder) == "." else [])
    close = difflib.get_close_matches(path.name, words, n=3, cutoff=0.6)
    if close:
        return "; did you mean " + " or ".join(w if w == "self" else str(folder / w) for w in close) + "?"
    if not folder.is_dir():
        return f" (folder {str(folder)!r} does not exist)"
    return "; give `self`, a .txt/.jsonl/.parquet path, or hf:NAME[:CONFIG][:SPLIT]"
