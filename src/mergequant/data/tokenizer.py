"""Reading a model's tokenizer, and making one put BOS first by itself, as a prefix that stands for BOS demands."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mergequant.errors import InputError, ModelError

__all__ = ["has_tokenizer", "read_tokenizer", "set_bos_in_tokenizer"]

VOCABULARIES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder holds the files of a tokenizer."""
    return any(path.is_file() for pattern in VOCABULARIES for path in folder.glob(pattern))


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder.

    Raises:
        ModelError: there is none, or a broken one. (transformers would make up an empty one for some families, which
            turns every text into nothing.)
    """
    if not has_tokenizer(folder):
        raise ModelError(f"{folder}: no tokenizer there; put the tokenizer's files into the folder, or pass tokenizer=")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: its tokenizer cannot be loaded ({error}); put working files there") from error


def set_bos_in_tokenizer(tokenizer: Any, bos_id: int) -> bool:
    """Make a fast tokenizer put BOS in front of every text, as a model whose prefix stands for BOS demands.

    Returns:
        True where it had to be changed, False where it already does so.

    Raises:
        InputError: a tokenizer without a fast backend, or one that puts another token first.
    """
    ids = tokenizer("a")["input_ids"]
    if ids and ids[0] == bos_id:
        return False
    backend = getattr(tokenizer, "backend_tokenizer", None)
    special = set(tokenizer.all_special_ids)
    if backend is None or (ids and ids[0] in special):
        why = "is not a fast tokenizer" if backend is None else f"starts texts with token {ids[0]}"
        raise InputError(f"the tokenizer {why}, the model needs token {bos_id} first; use a tokenizer that adds it")
    from tokenizers import Tokenizer

    whole = json.loads(backend.to_str())
    whole["post_processor"] = _with_bos(whole["post_processor"], tokenizer.convert_ids_to_tokens(bos_id), bos_id)
    backend.post_processor = Tokenizer.from_str(json.dumps(whole)).post_processor
    return True


def _with_bos(processor: dict[str, Any] | None, token: str, bos_id: int) -> dict[str, Any]:
    """A post-processor (as tokenizer.json holds it) that also puts BOS first; what it did before, it goes on doing."""
    parts = (
        processor["processors"] if processor and processor["type"] == "Sequence" else [processor] if processor else []
    )
    template = next((part for part in parts if part["type"] == "TemplateProcessing"), None)
    if template is None:
        texts = [{"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB")]
        template = {"type": "TemplateProcessing", "single": texts[:1], "pair": texts, "special_tokens": {}}
        parts = [*parts, template]
    for form in ("single", "pair"):
        template[form] = [{"SpecialToken": {"id": token, "type_id": 0}}, *template[form]]
    template["special_tokens"][token] = {"id": token, "ids": [bos_id], "tokens": [token]}
    return parts[0] if len(parts) == 1 else {"type": "Sequence", "processors": parts}
