"""Learned affine transforms per site, with learned clipping, trained block by block (FlatQuant, arXiv 2410.09426)."""

import copy
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from mergequant import ops
from mergequant.calibration import BlockContext, mix_values
from mergequant.errors import RecipeError
from mergequant.grids import IntegerGrid
from mergequant.models import Site
from mergequant.models.probe import TOLERANCE, relative_difference
from mergequant.steps.base import BlockStep
from mergequant.steps.reconstruct import Training, fake_quantize, reconstruct
from mergequant.steps.residual import whole_heads
from mergequant.transforms import Kronecker, TokenScheme, factor_sizes, smoothing_scale

__all__ = ["Flatten"]

OPEN = 4.0  # sigmoid(4) = 0.982: where learned clip ratios begin, as in the paper's code
LEAST_CLIP = 0.05  # a clip ratio stays above this


@dataclass(frozen=True)
class Flatten(BlockStep):
    """Learn x -> x / d (P1 (x) P2) for every site, and how far inputs and weight rows are clipped.

    P1 and P2 are U diag(s) V^T with U and V orthogonal (Cayley) and s > 0. The scale d per channel goes into the norm
    in front, or into the rows of up_proj; where o_proj reads whole value heads, P2 mixes the channels of a head and
    goes into v_proj, so that only P1, across heads, is left for the run time. Sets dynamic inputs with the learned
    ratio, and clipped weights as what is to be rounded. Put it before all steps of a site.

    Attributes:
        weight_bits, activation_bits: of the rounding in the loop.
        start: U of every factor begins as a Hadamard-like rotation, as a random orthogonal matrix, or as the identity.
        scale: learn d; it begins at SmoothQuant's scale with the exponent `alpha`.
        clip: learn the clip ratios; else nothing is clipped.
        rate, clip_rate: learning rates of transforms and of clip ratios.
        epochs, chunks, batch_tokens: see `reconstruct.Training`.
    """

    name: ClassVar[str] = "flatten"
    weight_bits: int = 4
    activation_bits: int = 4
    start: Literal["hadamard", "random", "identity"] = "hadamard"
    scale: bool = True
    alpha: float = 0.3
    clip: bool = True
    rate: float = 5e-3
    clip_rate: float = 5e-2
    epochs: int = 15
    chunks: int = 16
    batch_tokens: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.chunks < 1 or self.batch_tokens < 0 or self.rate <= 0 or self.clip_rate <= 0:
            raise RecipeError("flatten: epochs, chunks, batch_tokens and the learning rates must be positive")
        if not 0 <= self.alpha <= 1:
            raise RecipeError(f"flatten: alpha {self.alpha} must be between 0 and 1")

    def run(self, context: BlockContext) -> None:
        if context.sites:
            raise RecipeError(f"{context.name}: flatten changes the whole block; put it before all steps of a site")
        block = copy.deepcopy(context.module)
        flats = self._prepare(context, block)
        rates = {"*.transform.*": self.rate}
        if self.clip:
            rates |= {"*.input_clip": self.clip_rate, "*.weight_clip": self.clip_rate}
        if self.epochs:
            training = Training(self.epochs, self.chunks, self.batch_tokens, even=True)
            advice = f"lower flatten.rate (now {self.rate}) or flatten.clip_rate (now {self.clip_rate})"
            history = reconstruct(context, block, rates, training, advice)
            context.report("block", loss_first_epoch=history[0], loss_last_epoch=history[-1])
        with torch.no_grad():
            for flat in flats:
                self._apply_to_block(context, flat)
            for flat in flats:
                self._apply_to_site(context, flat)

    def _prepare(self, context: BlockContext, block: nn.Module) -> list["_SiteFlat"]:
        """Put trainable linears into a copy of the block."""
        flats: list[_SiteFlat] = []
        for site in context.structure.sites:
            head = _fusable_head(context, site)
            order = (site.width // head, head) if head else factor_sizes(site.width)
            flat = _SiteFlat(site, order, bool(head), self, context.generator).to(context.device)
            if self.scale and not head and (site.norm is not None or site.producer is not None):
                flat.transform.learn_scale(self._first_scale(context, site), site)
            flats.append(flat)
        for flat in flats:
            rows = [other for other in flats if other.fused and other.site.producer is not None]
            for name in flat.site.consumers:
                fed = next((other for other in rows if other.site.producer.rows.linear == name), None)  # type: ignore[union-attr]
                linear = _FlatLinear(context.linear(name), flat, fed, self)
                path, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(path), leaf, linear.to(context.device))
                flat.linears[name] = linear
        return flats

    def _first_scale(self, context: BlockContext, site: Site) -> Tensor:
        inputs = torch.zeros(site.width, device=context.device)
        captured = context.capture(site)
        roles = [chunk.role for chunk in context.chain.chunks if chunk.role != "verify"]
        for role, chunk in zip(roles, captured, strict=True):
            if role == "calibration":
                inputs = torch.maximum(inputs, chunk.abs().amax(0))
        captured.close()
        weights = torch.stack([context.linear(name).weight.abs().amax(0) for name in site.consumers]).amax(0)
        return smoothing_scale(inputs, weights, self.alpha)

    def _apply_to_block(self, context: BlockContext, flat: "_SiteFlat") -> None:
        """Move into norms and producers what they can take up; the block's function stays what it was."""
        scale = flat.transform.scale()
        if scale is not None:
            context.scale_channels(flat.site, scale)
        if flat.fused:
            context.mix_values(flat.site, flat.transform.right.matrices()[0])

    def _apply_to_site(self, context: BlockContext, flat: "_SiteFlat") -> None:
        own = context.site(flat.site)
        left, right = (factor.matrices()[0].float() for factor in (flat.transform.left, flat.transform.right))
        kronecker = Kronecker(left, None if flat.fused else right)
        own.flatten(kronecker)
        ratio = float(flat.input_ratio())
        own.scheme = TokenScheme(self.activation_bits, ratio)
        own.targets = {}
        for name, weight in own.weights.items():
            bound = weight.abs().amax(1, keepdim=True) * flat.linears[name].weight_ratio()
            own.targets[name] = torch.maximum(torch.minimum(weight, bound), -bound)
        own.report(condition=Kronecker(left, right).condition, clip_ratio=ratio)


class _Factor(nn.Module):
    """A trainable invertible matrix U diag(s) V^T of some order; U = Cayley(A) U0, V = Cayley(B), s = exp(t)."""

    first: Tensor

    def __init__(self, order: int, start: str, generator: torch.Generator) -> None:
        super().__init__()
        self.turn_u, self.turn_v = (nn.Parameter(torch.zeros(order, order)) for _ in range(2))
        self.log_size = nn.Parameter(torch.zeros(order))
        first = torch.eye(order)
        if start == "hadamard":
            first = ops.rotation(order).matrix().float()
        elif start == "random":
            first, upper = torch.linalg.qr(torch.randn(order, order, generator=generator))
            first = first * upper.diagonal().sign()
        self.register_buffer("first", first)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """The matrix and its inverse transposed."""
        u, v = _cayley(self.turn_u) @ self.first, _cayley(self.turn_v)
        size = self.log_size.exp()
        return (u * size) @ v.t(), (u / size) @ v.t()


class _Transform(nn.Module):
    """x -> (x / d) (left (x) right), and its inverse on weights."""

    channel: Tensor | None

    def __init__(self, order: tuple[int, int], start: str, generator: torch.Generator) -> None:
        super().__init__()
        self.left, self.right = (_Factor(size, start, generator) for size in order)
        self.log_scale: nn.Parameter | None = None
        self.register_buffer("channel", None)

    def learn_scale(self, first: Tensor, site: Site) -> None:
        """Begin to learn d, one value for all channels that one row of the producer feeds."""
        rows = torch.arange(site.width) if site.producer is None else torch.tensor(site.producer.channel)
        rows = rows.to(first.device)
        largest = torch.zeros(int(rows.max()) + 1, device=first.device).scatter_reduce(0, rows, first, "amax")
        self.log_scale = nn.Parameter(largest.clamp_min(1e-5).log())
        self.channel = rows

    def scale(self) -> Tensor | None:
        """d (width,), None if it is not learned."""
        return None if self.log_scale is None else self.log_scale.exp()[self.channel]

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale()
        x = x if scale is None else x / scale
        return _kronecker(x, self.left.matrices()[0], self.right.matrices()[0])

    def fold(self, weight: Tensor) -> Tensor:
        """d W P^-T."""
        scale = self.scale()
        weight = weight if scale is None else weight * scale
        return _kronecker(weight, self.left.matrices()[1], self.right.matrices()[1])


class _SiteFlat(nn.Module):
    """What the linears of a site share: the transform and the input's clip ratio."""

    def __init__(
        self, site: Site, order: tuple[int, int], fused: bool, step: Flatten, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.site, self.fused, self.bits = site, fused, step.activation_bits
        self.transform = _Transform(order, step.start, generator)
        self.input_clip = nn.Parameter(torch.full((), OPEN)) if step.clip else None
        self.linears: dict[str, _FlatLinear] = {}

    def input_ratio(self) -> Tensor:
        """Share of a token's largest magnitude that its grid covers."""
        return _ratio(self.input_clip, self.transform.left.first)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.transform(x)
        high = IntegerGrid(self.bits).high
        scale = (flat.abs().amax(-1, keepdim=True) * (self.input_ratio() / high)).clamp_min(1e-12)
        return fake_quantize(flat, scale, self.bits)


class _FlatLinear(nn.Module):
    """A linear with transformed, clipped and rounded weight behind a transformed and rounded input."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, old: nn.Linear, flat: _SiteFlat, fed: _SiteFlat | None, step: Flatten) -> None:
        super().__init__()
        self.flat, self.bits = flat, step.weight_bits
        self.__dict__["fed"] = fed  # no child: its parameters belong to the site that it feeds
        self.register_buffer("weight", old.weight.detach().clone())
        self.register_buffer("bias", None if old.bias is None else old.bias.detach().clone())
        self.weight_clip = nn.Parameter(torch.full((old.weight.shape[0], 1), OPEN)) if step.clip else None

    def weight_ratio(self) -> Tensor:
        """Share of every row's largest magnitude that its grid covers (outputs, 1) or ()."""
        return _ratio(self.weight_clip, self.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight, fed = self.weight, self.__dict__["fed"]
        if fed is not None:
            weight = self._mixed(weight, fed, fed.transform.right.matrices()[0])
        weight = self.flat.transform.fold(weight)
        high = IntegerGrid(self.bits).high
        bound = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) * self.weight_ratio()
        weight = fake_quantize(torch.maximum(torch.minimum(weight, bound), -bound), bound / high, self.bits)
        if fed is not None:  # values leave in the old basis, that of a prefix's values; o_proj's input transforms them
            weight = self._mixed(weight, fed, fed.transform.right.matrices()[1].t())
        return nn.functional.linear(self.flat(x), weight, self.bias)

    def _mixed(self, weight: Tensor, fed: _SiteFlat, matrix: Tensor) -> Tensor:
        """Rows of each value head multiplied by a matrix from the right (as outputs are)."""
        producer = fed.site.producer
        if producer is None:
            return weight
        start, stop = producer.rows.start, producer.rows.stop
        heads = weight[start:stop].reshape(-1, matrix.shape[0], weight.shape[1])
        return torch.cat([weight[:start], (matrix.t() @ heads).reshape(stop - start, -1), weight[stop:]])


def _cayley(turn: Tensor) -> Tensor:
    """(I - A)^-1 (I + A) with A the skew part of a square matrix: orthogonal."""
    skew = (turn - turn.t()) / 2
    identity = torch.eye(turn.shape[0], dtype=turn.dtype, device=turn.device)
    return torch.linalg.solve(identity - skew, identity + skew)


def _kronecker(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """As `ops.kronecker_transform`, with gradients."""
    return (left.t() @ (x.reshape(-1, left.shape[0], right.shape[0]) @ right)).reshape(x.shape)


def _ratio(clip: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones((), device=like.device) if clip is None else torch.sigmoid(clip).clamp_min(LEAST_CLIP)


def _fusable_head(context: BlockContext, site: Site) -> int:
    """Width of a value head where mixing the channels of each can be fused, proven in float64; 0 where it cannot."""
    shell = context.chain.shell
    if site.kind != "attention_output":
        return 0
    config = shell.config.get_text_config()
    width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    if not whole_heads(site, width):
        return 0
    generator = torch.Generator().manual_seed(0)
    block, run, hidden = shell.random_block(context.index, generator)
    before = run(block, hidden)
    matrix = torch.randn(width, width, dtype=torch.float64, generator=generator).to(hidden.device)
    mix_values(block, site, matrix + 2 * torch.eye(width, dtype=torch.float64, device=hidden.device))
    return width if relative_difference(run(block, hidden), before) <= TOLERANCE else 0
