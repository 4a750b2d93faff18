"""A tokenizer that adds BOS by itself."""

import copy

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from mergequant.errors import DataError

__all__ = ["add_bos"]


def add_bos(tokenizer: PreTrainedTokenizerBase, bos_id: int) -> PreTrainedTokenizerBase:
    """A copy of a tokenizer whose plain call begins every text with `bos_id`; the same one if it does already.

    Raises:
        DataError: a slow tokenizer that does not add BOS; it has no post-processor to change.
    """
    if tokenizer("a").input_ids[:1] == [bos_id]:
        return tokenizer
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise DataError(
            f"{type(tokenizer).__name__} adds no BOS and cannot be told to; save it as a fast one (tokenizer.json)"
        )
    changed = copy.deepcopy(tokenizer)
    bos = changed.convert_ids_to_tokens(bos_id)
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B:1", special_tokens=[(bos, bos_id)]
    )
    return changed
