"""What a step of a recipe works on: a block, and inside it one site at a time."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mergequant import ops
from mergequant.calibration.chain import Chain, Role, check_finite
from mergequant.calibration.store import ActivationStore
from mergequant.errors import RecipeError, StructureError
from mergequant.models import BiasedNorm, BlockStructure, NormRole, Producer, Site
from mergequant.nn import QuantLinear
from mergequant.solvers import CodebookSolution, GramSum, Solution
from mergequant.transforms import FloatScheme, InputScheme, Kronecker

__all__ = ["BlockContext", "SiteContext", "mix_values"]

LARGEST_ROUNDING = 0.1  # relative, of a gain that is stored in 16 bits; beyond it the gain stays as it is


class _Captured(Exception):  # noqa: N818
    """Ends a forward pass once the tensor that was wanted has been seen."""


@dataclass
class BlockContext:
    """One block while it is being quantized.

    Attributes:
        chain: hidden states that enter the block (quantized upstream), and how the block is run.
        structure: its sites.
        generator: seeded by the run's seed and the block's number.
        sites: contexts of the sites that have been opened, by name.
        figures: what steps report, by site and step.
        progress: called with a line of text now and then by steps that take long.
        held: multiplier and shift (each (width,)) that what a site's consumers read goes through, by the site's name:
            where nothing in front could take them up. The input quantizers of the consumers will hold them.
        measured: what steps have measured on the whole float model beforehand, by their own names.
        rotates_keys: a quantized cache keeps the keys of each head rotated; its steps are those of rotated keys.
    """

    chain: Chain
    structure: BlockStructure
    generator: torch.Generator
    sites: dict[str, "SiteContext"] = field(default_factory=dict)
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    progress: Callable[[str], None] = field(default=lambda text: None)
    held: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    measured: Mapping[str, Tensor] = field(default_factory=dict)
    rotates_keys: bool = False

    @property
    def index(self) -> int:
        """Number of the block."""
        return self.chain.position

    @property
    def name(self) -> str:
        """Full name of the block."""
        return self.chain.shell.block_names[self.index]

    @property
    def module(self) -> nn.Module:
        """The block itself."""
        return self.chain.shell.blocks[self.index]

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self.chain.shell.device

    def site(self, site: Site) -> "SiteContext":
        """The context of a site, opened at first use."""
        if site.name not in self.sites:
            self.sites[site.name] = SiteContext(self, site)
        return self.sites[site.name]

    def report(self, site: str, **figures: float) -> None:
        """Record figures of a site."""
        self.figures.setdefault(site, {}).update(figures)

    def capture(self, site: Site) -> ActivationStore:
        """Float inputs of a site for all chunks (batch, tokens, width), upstream sites as they stand now."""
        store = ActivationStore(self.chain.policy)
        seen: list[Tensor] = []

        def keep(value: Tensor) -> None:
            seen.append(value)
            raise _Captured

        if site.norm is not None:
            target = self.module.get_submodule(site.norm.name)
            handle = target.register_forward_hook(lambda _module, _args, output: keep(output))
        else:
            target = self.module.get_submodule(site.consumers[0])
            handle = target.register_forward_pre_hook(lambda _module, args: keep(args[0]))
        try:
            for number, chunk in enumerate(self.chain.chunks):
                seen.clear()
                if chunk.role == "verify":
                    continue
                with suppress(_Captured):
                    self.chain.run(self.chain.hidden[number])
                if not seen:
                    raise StructureError(f"{self.name}.{site.name} was not reached when its block was run")
                store.append(seen[0].reshape(-1, site.width))
        finally:
            handle.remove()
        return store

    def linear(self, name: str) -> nn.Linear:
        """One of the block's linears that is still in floating point."""
        module = self.module.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise StructureError(f"{self.name}.{name} is a {type(module).__name__}; it has been quantized already")
        return module

    def replace(self, name: str, module: nn.Module) -> None:
        """Put a quantized module in the place of one of the block's own."""
        path, _, leaf = name.rpartition(".")
        setattr(self.module.get_submodule(path), leaf, module)

    def scale_channels(self, site: Site, scale: Tensor) -> Tensor:
        """Divide what feeds a site by a scale per channel and multiply its consumers' columns by it: nothing changes.

        A norm stays a float norm, in the dtype that the model is stored in; its consumers make up for the rounding of
        its gain. The prefix's values follow the value projection. In front of linears that read the residual stream
        itself, their own inputs are divided (`held`).

        Args:
            site: its consumers are still in floating point, and it has a norm or a producer, or reads the stream.
            scale: (width,), positive, equal for all channels that one producer row feeds.

        Returns:
            The scale that was applied (width,).

        Raises:
            StructureError: the site has nothing to move a scale to.
        """
        if site.norm is not None:
            scale = self._scale_norm(site.norm, scale)
        elif site.producer is not None:
            channel = torch.tensor(site.producer.channel, device=scale.device)
            rows = site.producer.rows
            factor = torch.ones(rows.stop - rows.start, dtype=scale.dtype, device=scale.device)
            factor[channel] = 1 / scale
            self.absorb(site.producer, factor)
            if site.kind == "attention_output":
                self.absorb_in_prefix(factor)
        elif site.kind == "stream":
            self._hold(site, 1 / scale, torch.zeros_like(scale))
        else:
            raise StructureError(f"{self.name}.{site.name}: no norm or linear in front of it can take up a scale")
        for name in site.consumers:
            self.linear(name).weight.detach().mul_(scale)
        return scale

    def shift_channels(self, site: Site, shift: Tensor) -> Tensor:
        """Subtract a constant per channel from what a norm gives and add W shift to its consumers' biases.

        Nothing changes. A norm without a bias becomes one with a bias (`BiasedNorm`), and so do the consumers. The
        norm's new bias is one of the dtype that the model is stored in; consumers make up for the rounding.

        In front of linears that read the residual stream itself, their own inputs are shifted (`held`).

        Args:
            site: its consumers are still in floating point, and a norm feeds it, or it reads the stream.
            shift: (width,).

        Returns:
            The shift that was applied (width,).

        Raises:
            StructureError: no norm feeds the site.
        """
        if site.kind == "stream":
            self._hold(site, torch.ones_like(shift), -shift)
        else:
            shift = self._shift_norm(site, shift)
        if bool(shift.any()):
            for name in site.consumers:
                linear = self.linear(name)
                moved = (linear.weight.detach().double() @ shift.double()).to(linear.weight)
                old: Tensor | None = linear.bias
                linear.bias = nn.Parameter(moved if old is None else old.detach() + moved, requires_grad=False)
        return shift

    def _shift_norm(self, site: Site, shift: Tensor) -> Tensor:
        role = site.norm
        if role is None:
            raise StructureError(f"{self.name}.{site.name}: no norm in front of it can take up a shift")
        module = self.module.get_submodule(role.name)
        bias = role.bias(module)
        if bias is None:
            module = BiasedNorm(role, module)
            self.replace(role.name, module)
            bias = torch.zeros_like(role.gain(module))
        role.set_bias(module, (bias - shift).to(self.chain.shell.stored_dtype))
        applied = role.bias(module)
        return bias if applied is None else bias - applied

    def _hold(self, site: Site, multiplier: Tensor, shift: Tensor) -> None:
        """Let the consumers of a site read `x * multiplier + shift`, behind what they read now."""
        if site.name not in self.held:

            def scaled(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                own, moved = (part.to(args[0]) for part in self.held[site.name])
                return args[0] * own + moved, *args[1:]

            for name in site.consumers:  # the hooks go when quantized modules take the linears' places
                self.linear(name).register_forward_pre_hook(scaled)
            self.held[site.name] = torch.ones_like(multiplier), torch.zeros_like(shift)
        own, moved = self.held[site.name]
        self.held[site.name] = own * multiplier, moved * multiplier + shift

    def _scale_norm(self, role: NormRole, scale: Tensor) -> Tensor:
        module, stored = self.module.get_submodule(role.name), self.chain.shell.stored_dtype
        gain, bias, weight = role.gain(module), role.bias(module), module.get_parameter("weight").detach()
        wanted = gain / scale
        role.set_gain(module, wanted)
        exact = weight.clone()
        weight.copy_(weight.to(stored))
        lost = (role.gain(module) - wanted).abs() > LARGEST_ROUNDING * wanted.abs()  # 1 + weight, almost cancelled
        weight.copy_(torch.where(lost, exact, weight))
        applied = role.gain(module)
        scale = torch.where(applied != 0, gain / applied, scale)
        if bias is not None:
            role.set_bias(module, bias / scale)
        return scale

    def absorb(self, producer: Producer, factor: Tensor) -> None:
        """Multiply the rows of a producer by a factor each (rows,): exact, whether it is quantized already or not.

        The prefix's values are outputs of the value projection and are multiplied by `absorb_in_prefix`.
        """
        rows = producer.rows
        quantized = self.module.get_submodule(rows.linear)
        if isinstance(quantized, QuantLinear):
            quantized.scale_rows(factor, rows.start, rows.stop)
        else:
            module = self.linear(rows.linear)
            with torch.no_grad():
                module.weight[rows.start : rows.stop] *= factor[:, None].to(module.weight)
                if module.bias is not None:
                    module.bias[rows.start : rows.stop] *= factor.to(module.bias)
            for site in self.sites.values():  # a site that was opened before holds copies of its weights
                for held in (site.weights, site.targets or {}):
                    if rows.linear in held:
                        held[rows.linear][rows.start : rows.stop] *= factor[:, None].to(held[rows.linear])

    def absorb_in_prefix(self, factor: Tensor) -> None:
        """Multiply the prefix's values by a factor per value row (kv_heads * width,)."""
        prefix = self.chain.prefix
        if prefix is not None:
            heads, width = prefix.values.shape[1], prefix.values.shape[3]
            prefix.values = prefix.values * factor.reshape(1, heads, 1, width).to(prefix.values)

    def mix_values(self, site: Site, matrix: Tensor) -> None:
        """Multiply the values of every head by a matrix and o_proj's columns by its inverse: nothing changes.

        The prefix's values follow.

        Args:
            site: the attention's output, its columns proven to be whole value heads; all of it in floating point.
            matrix: (head_width, head_width), invertible.

        Raises:
            StructureError: no value projection feeds the site.
        """
        if site.kind != "attention_output":
            raise StructureError(f"{self.name}.{site.name}: only the attention's output is fed by values")
        mix_values(self.module, site, matrix)
        if self.chain.prefix is not None:
            self.chain.prefix.values = (self.chain.prefix.values.double() @ matrix.double()).to(
                self.chain.prefix.values
            )


@dataclass
class SiteContext:
    """One site while it is being quantized.

    Attributes:
        block, site: where it is.
        scheme: how its input becomes codes, as far as the steps have decided.
        weights: float weights of the consumers (outputs, width), rotated if the site is.
        targets: weights to round (outputs, codes), once a step has folded or compensated them.
        rotation: name of the online rotation of the input, "" for none.
        transform: what the input is multiplied by online instead of a rotation, None for nothing.
        solutions: rounded weights, by consumer.
    """

    block: BlockContext
    site: Site
    scheme: InputScheme = field(default_factory=FloatScheme)
    rotation: str = ""
    transform: Kronecker | None = None
    weights: dict[str, Tensor] = field(default_factory=dict)
    targets: dict[str, Tensor] | None = None
    solutions: Mapping[str, Solution | CodebookSolution] = field(default_factory=dict)
    _inputs: ActivationStore | None = None
    _roles: list[Role] = field(default_factory=list)
    _divisor: Tensor | None = None  # of the captured inputs
    _offset: Tensor | None = None  # subtracted from the captured inputs before they are divided

    def __post_init__(self) -> None:
        for name in self.site.consumers:
            self.weights[name] = self.block.linear(name).weight.detach().float().clone()

    @property
    def name(self) -> str:
        """Full name of the site."""
        return f"{self.block.name}.{self.site.name}"

    def open(self) -> None:
        """Capture the site's inputs; earlier sites are expected to be quantized already."""
        if self._inputs is None:
            self._inputs = self.block.capture(self.site)
            self._roles = [chunk.role for chunk in self.block.chain.chunks if chunk.role != "verify"]
            for chunk in self._inputs:
                check_finite(chunk, f"{self.name}: input")

    def close(self) -> None:
        """Free the inputs."""
        if self._inputs is not None:
            self._inputs.close()
            self._inputs = None
            self._divisor = self._offset = None  # inputs that are captured from now on come shifted and scaled

    def rotate(self) -> None:
        """Rotate input and weights online by the Hadamard-like rotation of the width: (x R)(W R)^T = x W^T.

        Raises:
            RecipeError: the input is transformed already.
        """
        if self.transform is not None:
            raise RecipeError(f"{self.name}: its input is transformed online already; leave out one of the two steps")
        if not self.rotation:
            self.rotation = ops.rotation(self.site.width).name
            self.weights = {name: ops.hadamard_transform(weight) for name, weight in self.weights.items()}

    def flatten(self, transform: Kronecker) -> None:
        """Multiply the input by P online and the weights by its inverse: (x P)(W P^-T)^T = x W^T.

        Raises:
            RecipeError: the site is rotated, or its weights have been folded or corrected already.
        """
        self._require_untouched("transform")
        self.transform = transform
        self.weights = {name: transform.fold(weight) for name, weight in self.weights.items()}

    @property
    def can_scale(self) -> bool:
        """Whether something in front of the site can take up a scale per channel, or its own inputs do."""
        return self.site.norm is not None or self.site.producer is not None or self.site.kind == "stream"

    def scale_channels(self, scale: Tensor) -> None:
        """Divide the input channels by a scale (width,) and multiply the weight columns by it, in the block itself.

        Raises:
            RecipeError: the site is rotated, or its weights have been folded or corrected already.
            StructureError: as `BlockContext.scale_channels`.
        """
        self._require_untouched("scale")
        self.open()
        scale = self.block.scale_channels(self.site, scale)
        self.weights = {name: weight * scale for name, weight in self.weights.items()}
        self._divisor = scale if self._divisor is None else self._divisor * scale
        if self.has_bias:
            self.shift_channels(torch.zeros_like(scale))  # what the scaled bias loses in the stored dtype

    @property
    def can_shift(self) -> bool:
        """Whether a norm in front of the site can take up a constant per channel, or the site's own inputs do."""
        return self.site.begins_module

    @property
    def has_bias(self) -> bool:
        """Whether the norm in front of the site has a bias by now; what the inputs themselves are shifted by is one."""
        role = self.site.norm
        if role is None:
            return self.site.kind == "stream"
        return role.bias(self.block.module.get_submodule(role.name)) is not None

    def shift_channels(self, shift: Tensor) -> None:
        """Subtract a constant (width,) from the input channels and add W shift to the biases, in the block itself.

        Raises:
            RecipeError: the site is rotated, or its weights have been folded or corrected already.
            StructureError: as `BlockContext.shift_channels`.
        """
        self._require_untouched("shift")
        self.open()
        shift = self.block.shift_channels(self.site, shift)
        moved = shift if self._divisor is None else shift * self._divisor
        self._offset = moved if self._offset is None else self._offset + moved

    def _require_untouched(self, what: str) -> None:
        touched = bool(self.rotation) or self.transform is not None or self.targets is not None
        if touched or not isinstance(self.scheme, FloatScheme):
            raise RecipeError(
                f"{self.name}: channels are {what.removesuffix('e')}ed before their input is rotated or quantized; "
                f"put the step that {what}s them first"
            )

    def chunks(self, role: Role = "calibration") -> Iterator[Tensor]:
        """Float inputs (tokens, width) chunk by chunk, shifted, scaled, transformed and rotated if the site is."""
        self.open()
        if self._inputs is None:
            raise StructureError(f"{self.name}: inputs were closed")
        for number, own in enumerate(self._roles):
            if own == role:
                chunk = self._inputs[number]
                if self._offset is not None:
                    chunk = chunk - self._offset
                if self._divisor is not None:
                    chunk = chunk / self._divisor
                if self.transform is not None:
                    chunk = self.transform.apply(chunk)
                yield ops.hadamard_transform(chunk) if self.rotation else chunk

    def windows(self, role: Role = "calibration") -> Iterator[Tensor]:
        """As `chunks`, with the windows apart: (windows, tokens, width)."""
        counts = [chunk.tokens.shape[0] for chunk in self.block.chain.chunks if chunk.role == role]
        for count, chunk in zip(counts, self.chunks(role), strict=True):
            yield chunk.unflatten(0, (count, -1))

    def sample(self, role: Role, tokens: int) -> Tensor:
        """At most `tokens` tokens of a role, evenly spread (tokens, width)."""
        self.open()
        total = sum(1 for own in self._roles if own == role)
        share = max(tokens // max(total, 1), 1)
        picked = []
        for chunk in self.chunks(role):
            rows, count = chunk.shape[0], min(share, chunk.shape[0])
            # The middles of `count` equal stretches; a whole stride would leave out the end of the chunk.
            middles = (2 * torch.arange(count, device=chunk.device) + 1) * rows // (2 * count)
            picked.append(chunk[middles])
        return torch.cat(picked)[:tokens]

    def stacked_weight(self) -> Tensor:
        """Weights of all consumers, one under the other (outputs, width)."""
        return torch.cat([self.weights[name] for name in self.site.consumers])

    def gram(self, values: Callable[[Tensor], Tensor] | None = None) -> GramSum:
        """Raw sum of v v^T over all calibration tokens, v what the GEMM sees under the current scheme."""
        values = self.scheme.values if values is None else values
        total: GramSum | None = None
        for chunk in self.chunks():
            coded = values(chunk)
            if total is None:
                total = GramSum.zeros(coded.shape[1], coded.shape[1], coded.device)
            total.add(coded)
        if total is None:
            raise StructureError(f"{self.name}: no calibration tokens")
        return total

    def energy(self, values: Callable[[Tensor], Tensor]) -> Tensor:
        """Sum over all calibration tokens of each channel's square: the Gram matrix's diagonal, without the matrix."""
        return torch.stack([values(chunk).double().square().sum(0) for chunk in self.chunks()]).sum(0)

    def report(self, **figures: float) -> None:
        """Record figures of this site."""
        self.block.report(self.site.name, **figures)


def mix_values(block: nn.Module, site: Site, matrix: Tensor) -> None:
    """As `BlockContext.mix_values`, on a block alone. Computed in float64, written in the block's dtype."""
    if site.producer is None:
        raise StructureError(f"{site.name}: no value projection is proven to feed it")
    wide, rows = matrix.double(), site.producer.rows
    for parameter in block.get_submodule(rows.linear).parameters():
        part = parameter.detach()[rows.start : rows.stop]
        heads = part.double().reshape(-1, wide.shape[0], *part.shape[1:])  # (kv_heads, head_width, inputs or none)
        part.copy_(torch.tensordot(heads, wide, dims=([1], [0])).movedim(-1, 1).reshape(part.shape))
    mixing = Kronecker(torch.eye(site.width // wide.shape[0], dtype=wide.dtype, device=wide.device), wide)
    for name in site.consumers:
        weight = block.get_submodule(name).get_parameter("weight").detach()
        weight.copy_(mixing.fold(weight))
