"""Steps on a whole block: SmoothAttention, channels in order of their size, and keys that a cache keeps rotated.

The first two are QServe's (arXiv 2405.04532; digest, steps 2 and 4); they cost nothing at run time and come before all
steps on sites. The third is QuaRot's (arXiv 2404.00456).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mergequant import ops
from mergequant.calibration import BlockContext
from mergequant.calibration.kv import record_kv
from mergequant.errors import RecipeError, StructureError
from mergequant.models import ModelShell, find_hidden_rows, find_query_key_rows, permute_hidden
from mergequant.steps.base import BlockStep
from mergequant.steps.residual import head_width

__all__ = ["Reorder", "RotateKeys", "SmoothAttention"]

SMALLEST = 1e-5  # of a key channel's largest magnitude


@dataclass(frozen=True)
class SmoothAttention(BlockStep):
    """Keys are divided by lam = max|K|^alpha per channel, queries multiplied by it, in the rows of their projections.

    K is the key after rotary embedding; channels that it mixes share the larger lam, and so do the query heads of a key
    head. The prefix's keys follow. Where no such rows are proven, as behind a norm of queries and keys, the block is
    left alone, and its figures say so (`attention_smoothed` = 0).

    Attributes:
        alpha: exponent; 0 changes nothing.
        tokens: calibration tokens that the largest magnitude is taken of.
    """

    name: ClassVar[str] = "smooth_attention"
    alpha: float = 0.5
    tokens: int = 16384

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1 or self.tokens < 1:
            raise RecipeError(f"smooth_attention: alpha {self.alpha} must be between 0 and 1, tokens positive")

    def run(self, context: BlockContext) -> None:
        _require_float(context, self.name)
        rows = find_query_key_rows(context.chain.shell, context.index)
        recorded = record_kv(context.chain, "calibration", self.tokens) if rows is not None else None
        context.report("block", attention_smoothed=float(recorded is not None))
        if rows is None or recorded is None:
            return
        factor = rows.tie(recorded[0].abs().amax(0)).clamp_min(SMALLEST).pow(self.alpha)
        rows.scale(context.module, factor)
        prefix = context.chain.prefix
        if prefix is not None:
            prefix.keys = prefix.keys / factor[None, :, None, :].to(prefix.keys)
        context.report("block", largest_key_scale=float(factor.max()), smallest_key_scale=float(factor.min()))


@dataclass(frozen=True)
class Reorder(BlockStep):
    """Channels between the layers of an MLP in falling order of their largest input, so that alike ones share a group.

    The order goes into the rows of gate and up and the columns of down. Other inputs stay as they are: the residual
    stream belongs to all blocks, and o_proj's channels can change places only within a value head, which is a group.
    Where it is not proven that the order does not count, the figures say so (`reordered` = 0).
    """

    name: ClassVar[str] = "reorder"

    def run(self, context: BlockContext) -> None:
        _require_float(context, self.name)
        for site in context.structure.sites:
            if site.kind != "mlp_output":
                continue
            rows = find_hidden_rows(context.chain.shell, context.index, site)
            context.report(site.name, reordered=float(rows is not None))
            if rows is None:
                continue
            largest: Tensor | None = None
            store = context.capture(site)
            for inputs in store:
                own = inputs.abs().amax(0)
                largest = own if largest is None else torch.maximum(largest, own)
            store.close()
            if largest is not None:
                permute_hidden(context.module, rows, site, torch.argsort(largest, descending=True, stable=True))


@dataclass(frozen=True)
class RotateKeys(BlockStep):
    """R3: the quantized cache rounds the keys of each head, after rotary embedding, times a Hadamard rotation.

    One orthogonal matrix behind queries and keys leaves their products as they are, so this is a property of the cache
    alone: its steps are measured on rotated keys, and attention sees them rotated back. Weights and activations do not
    change, so it does not matter where among the steps this one stands.
    """

    name: ClassVar[str] = "rotate_keys"

    def check(self, shell: ModelShell) -> None:
        if not all(structure.causal for structure in shell.structures):
            raise StructureError(
                "rotate_keys: every token sees the whole text, so there is no cache whose keys could be rotated. Leave "
                "it out (rotate_keys=false), or use smoothquant or gptq"
            )
        width = head_width(shell)
        rotation = ops.rotation(width)
        if not rotation.is_hadamard:
            raise StructureError(
                f"rotate_keys: heads have {width} channels, a width without a Hadamard matrix here (there is only "
                f"{rotation.name}). Leave it out (rotate_keys=false); the cache then has plain keys"
            )

    def run(self, context: BlockContext) -> None:
        context.rotates_keys = True


def _require_float(context: BlockContext, step: str) -> None:
    if context.sites:
        raise RecipeError(f"{context.name}: {step} changes float weights that other steps hold; put it before them")
