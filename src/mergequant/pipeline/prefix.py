"""Choosing the prefix: the tokens whose activations are massive wherever they stand.

PrefixQuant, arXiv 2410.05265 (as digested): a token is an outlier if its largest magnitude at the input of down_proj is
more than 64 times the median over tokens. Position 0 is represented by BOS; ids found at later positions follow it.
"""

from collections import Counter

import torch
from torch import Tensor

from mergequant.calibration import BlockContext, Chain, StorePolicy, chunked
from mergequant.errors import RecipeError
from mergequant.models import BlockStructure, ModelShell
from mergequant.recipes.recipe import PrefixChoice

__all__ = ["choose_prefix"]

OUTLIER_RATIO = 64.0
SEARCH_WINDOWS = 4
MOST_TOKENS = 4


def choose_prefix(
    choice: PrefixChoice,
    shell: ModelShell,
    structures: list[BlockStructure],
    windows: Tensor,
    bos: int | None,
    policy: StorePolicy,
) -> tuple[list[int], bool] | None:
    """Token ids of the prefix, and whether its first one stands for a prompt's BOS; None without a prefix.

    Args:
        choice: the recipe's prefix.
        shell, structures: the float model.
        windows: calibration windows (N, T), for "auto".
        bos: the tokenizer's BOS id if windows begin with it, else None.
        policy: where activations of the search may lie.

    Raises:
        RecipeError: "bos" for a model without BOS, or ids outside the vocabulary.
    """
    if choice == "none":
        return None
    if choice == "bos":
        if bos is None:
            raise RecipeError(
                "prefix=bos: this tokenizer has no BOS token, or the windows do not begin with it (--no-bos); "
                "use prefix=auto to search outlier tokens, or other=dynamic, which needs no prefix"
            )
        return [bos], True
    if choice == "auto":
        found = find_outlier_tokens(shell, structures, windows[:SEARCH_WINDOWS], policy)
        tokens = ([bos] if bos is not None else []) + [token for token in found if token != bos]
        if not tokens:
            raise RecipeError("prefix=auto found no outlier token, and there is no BOS; use other=dynamic")
        return tokens[:MOST_TOKENS], bos is not None
    ids = [int(token) for token in choice]
    for token in ids:
        if not 0 <= token < shell.vocabulary:
            raise RecipeError(f"prefix token {token} is outside the vocabulary of {shell.vocabulary}")
    return ids, bool(ids) and ids[0] == bos


def find_outlier_tokens(
    shell: ModelShell, structures: list[BlockStructure], windows: Tensor, policy: StorePolicy
) -> list[int]:
    """Ids of outlier tokens after position 0, the most frequent first, as many as a window holds on average."""
    chain = Chain(shell, list(chunked(windows, "calibration")), policy, None)
    counts: Counter[int] = Counter()
    for index, structure in enumerate(structures):
        shell.load_block(index)
        context = BlockContext(chain, structure, torch.Generator())
        for site in structure.sites:
            if site.kind != "mlp_output":
                continue
            store = context.capture(site)
            for number, inputs in enumerate(store):
                tokens = chain.chunks[number].tokens
                largest = inputs.abs().amax(-1).reshape(tokens.shape).cpu()
                outlier = largest > OUTLIER_RATIO * largest.median()
                outlier[:, 0] = False
                counts.update(tokens[outlier].tolist())
            store.close()
        chain.advance()
        shell.release_block(index)
    chain.close()
    per_window = -(-sum(counts.values()) // max(len(windows) * len(structures), 1))
    return [token for token, _ in counts.most_common(per_window)]
