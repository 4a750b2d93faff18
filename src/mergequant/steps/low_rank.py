"""Low-rank compensation: a trained correction of every weight, merged before the final rounding.

MergeQuant compensates with LoRA-like matrices (digest, step 8); where they go is not said in its abstract. Here they
are trained as in QLLM (arXiv 2310.08041: rank 4, AdamW, learning rate 5e-4, 10 epochs), with the quantizers of the
block's inputs in the loop, and added to the folded weights before rounding, so that nothing is added at run time. The
target is the float block's output for the same (quantized upstream) inputs. Rounding the weights in the loop too is an
option: with GPTQ after it, what is learnt against one rounding is lost in the other (`docs/log.md`). QLLM itself rounds
the weights without their correction in the loop, and trains the gains of the norms as well; both are options, too.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mergequant import ops
from mergequant.calibration import BlockContext, SiteContext
from mergequant.errors import RecipeError
from mergequant.grids import AbsMax, IntegerGrid, Quantizer
from mergequant.steps.base import BlockStep
from mergequant.steps.reconstruct import Training, reconstruct
from mergequant.transforms import InputScheme

__all__ = ["LowRank"]


@dataclass(frozen=True)
class LowRank(BlockStep):
    """Train a low-rank correction of all linears of the block's sites against the float block's output.

    Attributes:
        rank: of every correction.
        learning_rate, epochs: of AdamW, with cosine decay.
        chunks: calibration chunks (of about 4096 tokens) used.
        round_weights: round the weights in the loop too, to the nearest code of `weight_bits` bits.
        apart: the loop rounds W' and adds the correction, as QLLM does, instead of rounding their sum: what merging
            rounds away is then not seen. Needs `round_weights`.
        norms: train the gains and biases of the norms that feed sites as well; they are stored in the dtype of the
            model.
        batch_tokens: tokens of one step of AdamW, in whole windows; 0 = a chunk.
    """

    name: ClassVar[str] = "low_rank"
    rank: int = 4
    learning_rate: float = 5e-4
    epochs: int = 10
    chunks: int = 16
    round_weights: bool = False
    weight_bits: int = 4
    apart: bool = False
    norms: bool = False
    batch_tokens: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.epochs < 1 or self.chunks < 1 or self.learning_rate <= 0:
            raise RecipeError("low_rank: rank, epochs, chunks and learning_rate must be positive")
        if self.apart and not self.round_weights:
            raise RecipeError("low_rank: apart says where weights are rounded in the loop; set round_weights, too")

    def run(self, context: BlockContext) -> None:
        contexts = [context.site(site) for site in context.structure.sites]
        block, corrections = self._trainable(context, contexts)
        norms = [own.site.norm.name for own in contexts if own.site.norm is not None] if self.norms else []
        rates = dict.fromkeys(["*.down", "*.up", *(f"{name}.*" for name in norms)], self.learning_rate)
        training = Training(self.epochs, self.chunks, self.batch_tokens)
        advice = f"lower low_rank.learning_rate (now {self.learning_rate}), or leave out this step"
        history = reconstruct(context, block, rates, training, advice)
        for own in contexts:
            own.targets = {name: corrections[name].corrected().detach() for name in own.site.consumers}
        for name in norms:
            trained = dict(block.get_submodule(name).named_parameters())
            for leaf, parameter in context.module.get_submodule(name).named_parameters():
                parameter.detach().copy_(trained[leaf].detach().to(context.chain.shell.stored_dtype))
        context.report("block", low_rank_loss_first_epoch=history[0], low_rank_loss_last_epoch=history[-1])

    def _trainable(
        self, context: BlockContext, contexts: list[SiteContext]
    ) -> tuple[nn.Module, dict[str, "_CorrectedLinear"]]:
        """A copy of the block with fake-quantized linears that carry corrections."""
        block = copy.deepcopy(context.module)
        corrections: dict[str, _CorrectedLinear] = {}
        for own in contexts:
            if own.transform is not None:
                raise RecipeError(f"{own.name}: low_rank does not follow an online transform; leave out one of the two")
            encode = _straight_through(own.scheme, bool(own.rotation))
            for name in own.site.consumers:
                old = context.linear(name)
                folded = own.scheme.fold(own.weights[name])
                bits = self.weight_bits if self.round_weights else 0
                linear = _CorrectedLinear(folded, old.bias, encode, self.rank, bits, self.apart, context.generator)
                linear = linear.to(context.device)
                corrections[name] = linear
                path, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(path), leaf, linear)
        return block, corrections


class _CorrectedLinear(nn.Module):
    """y = values(x) @ (W' + up @ down)^T + bias, differentiable with respect to up and down.

    With `bits` > 0 the sum is rounded, or W' alone if the two are kept `apart`.
    """

    def __init__(
        self,
        folded: Tensor,
        bias: Tensor | None,
        encode: Callable[[Tensor], Tensor],
        rank: int,
        bits: int,
        apart: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        outputs, width = folded.shape
        self.folded, self.bias, self.encode = folded, bias, encode
        self.quantizer = Quantizer(IntegerGrid(bits), None, AbsMax()) if bits else None
        self.rounded = self.quantizer.encode(folded).decode() if self.quantizer is not None and apart else None
        # The correction begins at zero; its size follows each row's, so that one learning rate fits folded weights.
        drawn = torch.randn(rank, width, generator=generator)
        self.down = nn.Parameter(drawn.to(folded.device))
        self.up = nn.Parameter(torch.zeros(outputs, rank, device=folded.device))
        self.row_size = folded.square().mean(1, keepdim=True).sqrt()

    def corrected(self) -> Tensor:
        """W' + up @ down (outputs, width)."""
        return self.folded + self._correction()

    def _correction(self) -> Tensor:
        return self.row_size * (self.up @ self.down)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.corrected() if self.rounded is None else self.rounded + self._correction()
        if self.quantizer is not None and self.rounded is None:
            quantized = self.quantizer.encode(weight.detach()).decode()
            weight = weight + (quantized - weight).detach()
        return nn.functional.linear(self.encode(x), weight, self.bias)


def _straight_through(scheme: InputScheme, rotated: bool) -> Callable[[Tensor], Tensor]:
    """values(x) whose gradient is that of the unrounded values."""

    def encode(x: Tensor) -> Tensor:
        if rotated:
            # The rotation as plain matrix products: the op itself has no gradient.
            turn = ops.rotation(x.shape[-1])
            left, right = turn.left.to(x), turn.right.to(x)
            x = (left.t() @ (x.reshape(-1, left.shape[0], right.shape[0]) @ right)).reshape(x.shape)
        exact = scheme.exact_values(x)
        return exact + (scheme.values(x.detach()) - exact).detach()

    return encode
