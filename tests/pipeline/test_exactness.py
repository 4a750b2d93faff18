"""Without rounding, every transform keeps a block's float64 output within 1e-10, relative to its largest value.

Norms emit what `QuantNorm` would emit before rounding, producers absorb 1 / step, linears hold the folded weights; all
on the blocks of real transformers classes, with the masks and positions of their own forward.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import ENCODERS, FAMILIES, make_model
from mergequant import ops
from mergequant.calibration import BlockContext, Chain, Chunk, StorePolicy
from mergequant.models import BlockStructure, ModelShell, NormRole, Site
from mergequant.models.probe import all_double, relative_difference
from mergequant.steps.reassemble import can_divide
from mergequant.steps.residual import whole_heads
from mergequant.transforms import (
    ChannelScheme,
    FloatScheme,
    InputScheme,
    Kronecker,
    Reassembly,
    TensorScheme,
    TokenScheme,
    factor_sizes,
    split_channels,
    split_counts,
)

TOLERANCE = 1e-10


class ExactNorm(nn.Module):
    """What QuantNorm computes before it rounds, in float64."""

    def __init__(self, role: NormRole, norm: nn.Module, scheme: ChannelScheme) -> None:
        super().__init__()
        bias = role.bias(norm)
        self.role, self.index = role, scheme.index
        self.multiplier = role.gain(norm)[scheme.index] * scheme.multiplier
        self.shift = scheme.offset.double()
        if bias is not None:
            self.shift = self.shift + bias[scheme.index] * scheme.multiplier

    def forward(self, x: Tensor) -> Tensor:
        if self.role.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.role.eps)
        return x[..., self.index] * self.multiplier + self.shift


class ExactLinear(nn.Linear):
    """A linear with folded weights, behind what makes its input into codes, unrounded."""

    def __init__(self, old: nn.Linear, scheme: InputScheme, encode: Callable[[Tensor], Tensor], rotated: bool) -> None:
        super().__init__(1, 1, bias=False)
        weight = ops.hadamard_transform(old.weight) if rotated else old.weight
        self.weight = nn.Parameter(scheme.fold(weight.detach()).clone(), requires_grad=False)
        self.bias, self.encode, self.rotated = old.bias, encode, rotated

    def forward(self, x: Tensor) -> Tensor:
        x = self.encode(ops.hadamard_transform(x) if self.rotated else x)
        return nn.functional.linear(x, self.weight, self.bias)


def channel_scheme(steps: Tensor, generator: torch.Generator) -> ChannelScheme:
    """Strong channels split into staggered copies."""
    counts = split_counts(steps * torch.rand(steps.shape, generator=generator), steps.shape[0] // 3)
    scheme = split_channels(steps, counts, 4, stagger=True)
    assert int(counts.max()) > 1
    assert bool(scheme.offset.any())
    return scheme


def random_steps(count: int, generator: torch.Generator) -> Tensor:
    """float64 (count,), over a range of 64."""
    return torch.exp2(6 * torch.rand(count, dtype=torch.float64, generator=generator) - 3)


def put(block: nn.Module, name: str, module: nn.Module) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(path), leaf, module)


def migrate_norm(context: BlockContext, site: Site, generator: torch.Generator) -> None:
    scheme = channel_scheme(random_steps(site.width, generator), generator)
    block = context.module
    put(block, site.norm.name, ExactNorm(site.norm, block.get_submodule(site.norm.name), scheme))
    for name in site.consumers:
        put(block, name, ExactLinear(block.get_submodule(name), scheme, lambda x: x, rotated=False))


def migrate_channels(context: BlockContext, site: Site, generator: torch.Generator) -> None:
    """Static steps at o_proj or down_proj: absorbed by the producer where there is one."""
    steps = random_steps(site.width, generator)
    if site.producer is not None:
        channel = torch.tensor(site.producer.channel)
        rows = random_steps(site.producer.rows.stop - site.producer.rows.start, generator)
        steps = rows[channel]
        context.absorb(site.producer, 1 / rows)
    scheme = channel_scheme(steps, generator)

    def encode(x: Tensor) -> Tensor:
        codes = x[..., scheme.index] if site.producer is not None else scheme.exact_values(x)
        return codes + scheme.offset

    replace(context, site, scheme, encode, rotated=False)


def replace(
    context: BlockContext, site: Site, scheme: InputScheme, encode: Callable[[Tensor], Tensor], rotated: bool
) -> None:
    for name in site.consumers:
        put(context.module, name, ExactLinear(context.module.get_submodule(name), scheme, encode, rotated))


def plain(context: BlockContext, site: Site, scheme: InputScheme, *, rotated: bool) -> None:
    replace(context, site, scheme, scheme.exact_values, rotated)


def scale_channels(context: BlockContext, site: Site, generator: torch.Generator) -> None:
    """Scales behind norms and in front of o_proj and down_proj; a site that can take none up is left alone."""
    if not site.begins_module and site.producer is None:
        return
    scale = random_steps(site.width, generator)
    if site.norm is None and site.producer is not None:
        scale = scale[torch.tensor(site.producer.channel)]
    context.scale_channels(site, scale)


def shift_channels(context: BlockContext, site: Site, generator: torch.Generator) -> None:
    """Shifts behind norms, those without a bias included; then scales on top, as Outlier Suppression+ has it."""
    if site.begins_module:
        context.shift_channels(site, 3 * torch.randn(site.width, dtype=torch.float64, generator=generator))
    scale_channels(context, site, generator)


def kronecker(context: BlockContext, site: Site, generator: torch.Generator) -> None:
    """Online factors at every site; behind whole value heads the right one is fused into the value projection."""
    config = context.chain.shell.config.get_text_config()
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    fused = site.kind == "attention_output" and whole_heads(site, head)
    sizes = (site.width // head, head) if fused else factor_sizes(site.width)
    left, right = (
        torch.randn(size, size, dtype=torch.float64, generator=generator) + 2 * torch.eye(size, dtype=torch.float64)
        for size in sizes
    )
    if fused:
        context.mix_values(site, right)
    transform = Kronecker(left, None if fused else right)
    for name in site.consumers:
        old = context.module.get_submodule(name)
        old.weight.copy_(transform.fold(old.weight))
        put(context.module, name, ExactLinear(old, FloatScheme(), transform.apply, rotated=False))


def take_apart(context: BlockContext, site: Site, generator: torch.Generator) -> None:
    """Channels in copies, divided in front of the site where that is possible; a gather in front of the linears."""
    copies = torch.randint(1, 5, (site.width,), generator=generator)
    choice = Reassembly.apart(copies)
    if can_divide(site):
        context.scale_channels(site, choice.divisor.double())
    plain(context, site, choice.scheme(4), rotated=False)


TRANSFORMS: dict[str, Callable[[BlockContext, Site, torch.Generator], None]] = {
    "channel": lambda context, site, generator: (
        migrate_norm(context, site, generator) if site.norm else migrate_channels(context, site, generator)
    ),
    "channel_without_norm": lambda context, site, generator: migrate_channels(
        context, Site(site.name, site.kind, site.consumers, site.width, None, None, 0.0), generator
    ),
    "scale": scale_channels,
    "shift": shift_channels,
    "disassembly": take_apart,
    "kronecker": kronecker,
    "rotation": lambda context, site, _: plain(context, site, FloatScheme(), rotated=True),
    "token": lambda context, site, _: plain(context, site, TokenScheme(4, 0.7), rotated=True),
    "tensor": lambda context, site, _: plain(context, site, TensorScheme(4, 0.037), rotated=False),
    "rotated_tensor": lambda context, site, _: plain(context, site, TensorScheme(8, 0.37), rotated=True),
}


def deviation(shell: ModelShell, index: int, transform: str) -> float:
    """Largest relative change of a block's output when a transform acts on all of its sites."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(shell.vocabulary, (2, 13), generator=generator)
    policy = StorePolicy(torch.device("cpu"))
    chain = Chain(shell, [Chunk(tokens, "calibration")], policy, None)
    chain.position = index
    structure: BlockStructure = shell.structures[index]
    shell.load_block(index).double()
    hidden = chain.hidden[0].double() + torch.randn(chain.hidden[0].shape, dtype=torch.float64, generator=generator)
    kwargs = doubled(chain.arguments(hidden))

    def output() -> Tensor:
        with torch.no_grad(), all_double():
            result = shell.blocks[index](hidden, **kwargs)
        return result[0] if isinstance(result, tuple) else result

    before = output()
    context = BlockContext(chain, structure, generator)
    for site in structure.sites:
        TRANSFORMS[transform](context, site, generator)
    assert not torch.equal(output(), before)  # else nothing was exercised
    result = relative_difference(output(), before)
    shell.release_block(index)
    return result


def doubled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: doubled(item) for name, item in value.items()}
    return tuple(map(doubled, value)) if isinstance(value, tuple) else value


@pytest.fixture(scope="module", params=[*FAMILIES, *ENCODERS])
def family_shell(request: pytest.FixtureRequest) -> ModelShell:
    return ModelShell.open(make_model(request.param), dtype=torch.float64)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform_without_rounding_on_family_keeps_output(transform: str, family_shell: ModelShell) -> None:
    for index in range(len(family_shell.blocks)):
        assert deviation(family_shell, index, transform) < TOLERANCE


@pytest.mark.parametrize("name", ["stories260K", "tinystories-656k"])
def test_transforms_without_rounding_on_trained_model_keep_output(name: str, test_data: Path) -> None:
    shell = ModelShell.open(test_data / "models" / name, dtype=torch.float64)
    for transform in TRANSFORMS:
        for index in (0, len(shell.blocks) - 1):
            assert deviation(shell, index, transform) < TOLERANCE, transform


def test_deviation_when_a_weight_is_off_by_a_hundred_millionth_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The measure itself can fail."""

    def wrong(context: BlockContext, site: Site, generator: torch.Generator) -> None:
        migrate_channels(context, dataclasses.replace(site, norm=None, producer=None), generator)
        context.module.get_submodule(site.consumers[0]).weight.mul_(1 + 1e-8)

    monkeypatch.setitem(TRANSFORMS, "wrong", wrong)
    assert deviation(ModelShell.open(make_model("llama"), dtype=torch.float64), 0, "wrong") > TOLERANCE
