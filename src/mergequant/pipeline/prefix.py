"""Choosing the prefix: the tokens whose activations are massive wherever they stand.

PrefixQuant, arXiv 2410.05265 (as digested): a token is an outlier in a block if its largest magnitude at the input of
down_proj is more than 64 times the median over tokens, or if that of its key is less than an eighth of the median. As
many tokens are prefixed as a window holds outliers in the block that has the most: the one at position 0, for which BOS
stands, then the ids that are found most often at later positions.

Not searched: low queries, which no module of a block hands out by itself; they belong to the same tokens.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from mergequant.calibration import BlockContext, Chain, StorePolicy, chunked
from mergequant.calibration.kv import record_kv
from mergequant.errors import RecipeError
from mergequant.models import BlockStructure, ModelShell
from mergequant.recipes.recipe import PrefixChoice

__all__ = ["OutlierTokens", "choose_prefix", "find_outlier_tokens"]

OUTLIER_RATIO = 64.0
LOW_KEY_RATIO = 1 / 8
SEARCH_WINDOWS = 4
MOST_TOKENS = 4


@dataclass(frozen=True)
class OutlierTokens:
    """Tokens with massive activations in some block.

    Attributes:
        first: the id that is an outlier at position 0 most often; None if nothing is one there.
        later: ids at later positions, the most frequent first, as many as a window holds on average.
    """

    first: int | None
    later: tuple[int, ...]


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
        RecipeError: "bos" for a model without BOS, "auto" where nothing is found and there is no BOS, or ids outside
            the vocabulary.
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
        first = bos if bos is not None else found.first
        tokens = ([first] if first is not None else []) + [token for token in found.later if token != first]
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
) -> OutlierTokens:
    """Outlier tokens of the float model on windows (N, T)."""
    chain = Chain(shell, list(chunked(windows, "calibration")), policy, None)
    first: Counter[int] = Counter()
    later: Counter[int] = Counter()
    most = 0  # outliers after position 0, in the block that has the most
    for index, structure in enumerate(structures):
        shell.load_block(index)
        outlier = _outliers(BlockContext(chain, structure, torch.Generator())).reshape(windows.shape)
        first.update(windows[:, 0][outlier[:, 0]].tolist())
        later.update(windows[:, 1:][outlier[:, 1:]].tolist())
        most = max(most, int(outlier[:, 1:].sum()))
        chain.advance()
        shell.release_block(index)
    chain.close()
    per_window = -(-most // max(len(windows), 1))
    ids = tuple(token for token, _ in later.most_common(per_window))
    return OutlierTokens(first.most_common(1)[0][0] if first else None, ids)


def _outliers(context: BlockContext) -> Tensor:
    """Which tokens of all calibration chunks are outliers in this block: bool (tokens,), on the CPU."""
    chain = context.chain
    found = torch.zeros(sum(chunk.tokens.numel() for chunk in chain.chunks), dtype=torch.bool)
    for site in context.structure.sites:
        if site.kind == "mlp_output":
            store = context.capture(site)
            largest = torch.cat([inputs.abs().amax(-1).cpu() for inputs in store])
            store.close()
            found |= largest > OUTLIER_RATIO * largest.median()
    cached = record_kv(chain, "calibration", found.numel())
    if cached is not None:
        largest = cached[0].abs().amax((1, 2)).cpu()
        found |= largest < LOW_KEY_RATIO * largest.median()
    return found
