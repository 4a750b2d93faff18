"""Bits for every site under a budget for their average, by what each width is measured to do to the residual stream."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mergequant.calibration import Chain, StorePolicy, chunked
from mergequant.errors import RecipeError, UsageError
from mergequant.grids import AbsMax, ClipSearch, IntegerGrid, Quantizer, fitting_group
from mergequant.grids.integer import SUPPORTED_BITS
from mergequant.models import ModelShell, Site
from mergequant.models.roles import SiteKind
from mergequant.solvers import allocate
from mergequant.steps.base import ALL_SITES, MeasuringStep

__all__ = ["AllocateBits"]

SCALE_BITS, ZERO_BITS = 32, 8


@dataclass(frozen=True)
class AllocateBits(MeasuringStep):
    """Choose the width of every site's codes, so that all linears together take `average_bits` a weight.

    A width's cost is what it does to the block's output when the site is rounded to nearest in the float model: the
    mean over tokens of ||change||^2 / ||output||^2, which adds up over blocks. Widths are raised where that saves most
    for a bit (`solvers.allocate`). The linears of a site share a width.

    Attributes:
        average_bits: bits of codes, scales and zero points for each weight of a quantized linear.
        widths: bits to choose from.
        windows: calibration windows to measure on.
        group_size, zeros, clip, kinds: of the rounding that follows, and the sites it acts on.
    """

    name: ClassVar[str] = "allocate_bits"
    average_bits: float = 4.0
    widths: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    windows: int = 8
    group_size: int = 0
    zeros: bool = False
    clip: bool = False
    kinds: tuple[SiteKind, ...] = ALL_SITES

    def __post_init__(self) -> None:
        if not self.widths or any(width not in SUPPORTED_BITS for width in self.widths) or self.windows < 1:
            raise RecipeError(f"allocate_bits: widths {self.widths} must be of {SUPPORTED_BITS}, windows positive")
        if list(self.widths) != sorted(set(self.widths)):
            raise RecipeError(f"allocate_bits: widths {self.widths} must rise")

    def check(self, shell: ModelShell) -> None:
        """Refuse, while planning, an average that no choice of widths has. Raises RecipeError."""
        least, most, count = 0.0, 0.0, 0
        for index in range(len(shell.structures)):
            shapes = shell.block_parameters(index)
            for site in self._sites(shell, index):
                own = [shapes[f"{name}.weight"] for name in site.consumers]
                sizes = self._sizes(own)
                count += sum(math.prod(shape) for shape in own)
                least, most = least + sizes[0], most + sizes[-1]
        if not least <= self.average_bits * count <= most * (1 + 1e-9):
            raise RecipeError(
                f"average_bits={self.average_bits} cannot be met: widths {', '.join(map(str, self.widths))} with their "
                f"scales give {least / count:.3f} to {most / count:.3f} bits a weight on this model; choose an average "
                "between them, larger groups or other widths (allocate_bits.widths)"
            )

    def measure(
        self, shell: ModelShell, windows: Tensor, policy: StorePolicy, progress: Callable[[str], None]
    ) -> dict[str, Tensor]:
        chain = Chain(shell, list(chunked(windows[: self.windows], "calibration")), policy, None)
        names: list[str] = []
        costs: list[list[float]] = []
        sizes: list[list[float]] = []
        count = 0
        for index, block in enumerate(shell.block_names):
            progress(f"widths of block {index + 1} of {len(shell.block_names)}")
            module = shell.load_block(index)
            outputs = [chain.run(chain.hidden[number]) for number in range(len(chain.chunks))]
            for site in self._sites(shell, index):
                linears = [module.get_submodule(name) for name in site.consumers]
                weights = [linear.weight.data for linear in linears if isinstance(linear, nn.Linear)]
                names.append(f"{block}.{site.name}")
                costs.append([self._cost(chain, outputs, weights, width) for width in self.widths])
                sizes.append(self._sizes([tuple(weight.shape) for weight in weights]))
                count += sum(weight.numel() for weight in weights)
            chain.advance()
            shell.release_block(index)
        chain.close()
        try:
            forms = allocate(costs, sizes, self.average_bits * count)
        except UsageError as error:  # `check` has refused what can be known beforehand
            raise RecipeError(f"average_bits={self.average_bits} cannot be met: {error}") from error
        return {f"bits.{name}": torch.tensor(self.widths[form]) for name, form in zip(names, forms)}

    def _sites(self, shell: ModelShell, index: int) -> Iterator[Site]:
        return (site for site in shell.structures[index].sites if site.kind in self.kinds)

    @torch.no_grad()
    def _cost(self, chain: Chain, outputs: list[Tensor], weights: list[Tensor], width: int) -> float:
        kept = [weight.clone() for weight in weights]
        try:
            for weight in weights:
                group = fitting_group(weight.shape[1], self.group_size)
                search = ClipSearch() if self.clip else AbsMax()
                quantizer = Quantizer(IntegerGrid(width), group or None, search, self.zeros)
                weight.copy_(quantizer.encode(weight.float()).decode())
            changes = []
            for number, output in enumerate(outputs):
                moved = (chain.run(chain.hidden[number]) - output).float().square().sum(-1)
                changes.append((moved / output.float().square().sum(-1).clamp_min(1e-30)).flatten())
        finally:
            for weight, old in zip(weights, kept):
                weight.copy_(old)
        return float(torch.cat(changes).double().mean())

    def _sizes(self, shapes: list[tuple[int, ...]]) -> list[float]:
        """Bits that weights of these shapes (outputs, width) take with each width."""
        overhead = weights = 0
        for outputs, width in shapes:
            groups = width // (fitting_group(width, self.group_size) or width)
            overhead += outputs * groups * (SCALE_BITS + ZERO_BITS * self.zeros)
            weights += outputs * width
        return [float(bits * weights + overhead) for bits in self.widths]
