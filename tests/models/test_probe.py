from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from mergequant.errors import StructureError
from mergequant.models.discover import discover, draw_parameters
from mergequant.models.probe import TOLERANCE, all_double, identify_norm, probe, relative_difference
from mergequant.models.roles import NormRole, Producer, Site

WIDTH = 12


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


class Block(nn.Module):
    """norm -> up -> square root of a square -> down, with a residual; no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 20)
        self.down = nn.Linear(20, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).abs())


def run(block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), all_double():
        return block(hidden)


@pytest.fixture
def block() -> nn.Module:
    return draw_parameters(Block(), generator(), torch.device("cpu"))


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(2, 16, WIDTH, dtype=torch.float64, generator=generator())


def test_discover_and_probe_leave_the_parameters_as_they_were(block: nn.Module, hidden: torch.Tensor) -> None:
    before = {name: p.clone() for name, p in block.named_parameters()}
    structure = discover(block, hidden, run)
    assert [(site.name, site.kind) for site in structure.sites] == [("norm", "norm"), ("down", "mlp_output")]
    assert all(torch.equal(p, before[name]) for name, p in block.named_parameters())
    assert not any(module._forward_hooks for module in block.modules())


def test_probe_of_a_wrong_channel_map_deviates(block: nn.Module, hidden: torch.Tensor) -> None:
    site = discover(block, hidden, run).sites[1]
    assert site.producer is not None
    assert probe(block, site, run, hidden, generator()) < TOLERANCE
    shifted = Producer(site.producer.rows, site.producer.channel[1:] + site.producer.channel[:1])
    assert probe(block, replace(site, producer=shifted), run, hidden, generator()) > 1e-3


def test_probe_of_a_wrong_role_deviates(block: nn.Module, hidden: torch.Tensor) -> None:
    site = discover(block, hidden, run).sites[0]
    assert site.norm is not None
    assert probe(block, replace(site, norm=replace(site.norm, unit_offset=True)), run, hidden, generator()) > 1e-3


def test_probe_without_consumers_proves_nothing_and_is_refused(block: nn.Module, hidden: torch.Tensor) -> None:
    site = discover(block, hidden, run).sites[0]
    with pytest.raises(StructureError, match="nothing can be proven"):
        probe(block, replace(site, consumers=()), run, hidden, generator())


def test_probe_with_nothing_in_front_divides_what_the_consumers_read(block: nn.Module, hidden: torch.Tensor) -> None:
    site = Site("down", "mlp_output", ("down",), 20, None, None, 0.0)
    assert 0 < probe(block, site, run, hidden, generator()) < TOLERANCE
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_discover_when_a_weight_is_used_outside_of_its_linear_is_refused(hidden: torch.Tensor) -> None:
    class Twice(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inner = functional.gelu(self.up(self.norm(x)))
            return x + self.down(inner) + functional.linear(inner, self.down.weight)

    twice = draw_parameters(Twice(), generator(), torch.device("cpu"))
    with pytest.raises(StructureError, match=r"down: .*something else uses their weights"):
        discover(twice, hidden, run)


def test_discover_tells_blocks_that_see_later_tokens(block: nn.Module, hidden: torch.Tensor) -> None:
    class Backwards(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x.mean(1, keepdim=True)

    assert discover(block, hidden, run).causal
    backwards = draw_parameters(Backwards(), generator(), torch.device("cpu"))
    assert not discover(backwards, hidden, run).causal


def test_all_double_serves_casts_in_float64_and_ends_with_its_context() -> None:
    x = torch.full((3,), 1 + 2**-40, dtype=torch.float64)
    with all_double():
        assert torch.equal(x.float(), x)
        assert torch.equal(x.to(torch.bfloat16), x)
        assert functional.softmax(x, -1, dtype=torch.float32).dtype == torch.float64
    assert x.float().dtype == torch.float32


def test_relative_difference_of_nan_is_infinite() -> None:
    assert relative_difference(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


class OwnNorm(nn.Module):
    """A norm with an unusual name for its eps; `how` picks what it computes."""

    def __init__(self, how: str, width: int = WIDTH) -> None:
        super().__init__()
        self.tiny, self.how = 3e-6, how
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = x.square().mean(-1, keepdim=True)
        if self.how == "outside":  # eps outside the root
            return x / (size.sqrt() + self.tiny) * self.weight
        if self.how == "tanh":
            return torch.tanh(x) * self.weight
        x = x.float()  # as transformers does
        gain = 1 + self.weight if self.how == "offset" else self.weight
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.tiny) * gain


@pytest.mark.parametrize("how", ["plain", "offset"])
def test_norm_is_identified_by_what_it_computes(how: str) -> None:
    role = identify_norm("n", OwnNorm(how), WIDTH, generator())
    assert role == NormRole("n", "rms", 3e-6, how == "offset", WIDTH)


@pytest.mark.parametrize("how", ["outside", "tanh"])
def test_module_that_computes_something_else_is_no_norm(how: str) -> None:
    assert identify_norm("n", OwnNorm(how), WIDTH, generator()) is None


@pytest.mark.parametrize(
    "module",
    [
        OwnNorm("plain", WIDTH // 2),
        nn.LayerNorm(WIDTH, elementwise_affine=False),
        nn.PReLU(WIDTH),
        nn.Linear(WIDTH, WIDTH),
        nn.Sequential(nn.LayerNorm(WIDTH)),
    ],
    ids=["narrow", "no gain", "prelu", "linear", "wrapped"],
)
def test_module_of_another_shape_is_no_norm(module: nn.Module) -> None:
    assert identify_norm("n", module.double(), WIDTH, generator()) is None
