"""The tokenizer of a run, and the tokenizer and generation files of a checkpoint."""

import copy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerBase

from mergequant.data import Windows
from mergequant.data.spec import DataSpec, TokenSource
from mergequant.data.tokenizer import has_tokenizer, read_tokenizer, set_bos_in_tokenizer
from mergequant.errors import UsageError
from mergequant.models import ModelShell

__all__ = ["NoTokenizer", "bos_of", "find_tokenizer", "tokenizer_files"]

NOT_COPIED = ("config.json", "README.md")


@dataclass(frozen=True)
class NoTokenizer:
    """What stands in where all data are ready tokens and the model has no tokenizer: all it knows is the BOS id."""

    bos_token_id: int | None


def find_tokenizer(shell: ModelShell, spec: DataSpec) -> PreTrainedTokenizerBase | NoTokenizer:
    """The tokenizer in the model's folder. Ready tokens need none, so that it may be missing then.

    Raises:
        UsageError: a model in memory, and data that need a tokenizer.
        ModelError: the folder holds no tokenizer, or a broken one.
    """
    folder = shell.folder
    if (folder is None or not has_tokenizer(folder)) and all(
        isinstance(part.source, TokenSource) for part in spec.parts
    ):
        bos = getattr(shell.config.get_text_config(), "bos_token_id", None)
        return NoTokenizer(bos if isinstance(bos, int) else None)
    if folder is None:
        raise UsageError(
            "a model in memory comes without a tokenizer; pass tokenizer=AutoTokenizer.from_pretrained(...)"
        )
    return read_tokenizer(folder)


def bos_of(tokenizer: PreTrainedTokenizerBase | NoTokenizer, windows: Windows) -> int | None:
    """The BOS id that the windows begin with; None if they do not."""
    return tokenizer.bos_token_id if windows.begins_with_bos else None


def tokenizer_files(
    tokenizer: PreTrainedTokenizerBase | NoTokenizer, shell: ModelShell, prefix: tuple[list[int], bool] | None
) -> dict[str, bytes | str | Path]:
    """Everything that makes the model's folder complete besides weights, config and card.

    Files are copied as they are; only where the prefix stands for BOS and the tokenizer does not add one by itself is
    the tokenizer written anew, so that `tokenizer(text)` gives what the model takes.
    """
    files: dict[str, bytes | str | Path] = {}
    if shell.folder is not None:
        for path in sorted(shell.folder.iterdir()):
            weights = path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
            if path.is_file() and path.name not in NOT_COPIED and not weights and not path.name.endswith(".index.json"):
                files[path.name] = path
    generation = shell.model.generation_config if shell.model.can_generate() else None
    if generation is not None and "generation_config.json" not in files:
        files["generation_config.json"] = generation.to_json_string()
    needs_bos = prefix is not None and prefix[1]
    if not isinstance(tokenizer, NoTokenizer) and (shell.folder is None or needs_bos):
        written = copy.deepcopy(tokenizer)
        if prefix is not None and needs_bos:
            set_bos_in_tokenizer(written, prefix[0][0])
        with TemporaryDirectory() as folder:
            written.save_pretrained(folder)
            for path in Path(folder).iterdir():
                files[path.name] = path.read_bytes()
    return files
