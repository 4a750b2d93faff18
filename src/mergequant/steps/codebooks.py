"""Rounding to codebooks: vectors of outputs (VPTQ), or levels for every column at widths of their own (CMPQ)."""

import logging
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mergequant.calibration import SiteContext
from mergequant.errors import RecipeError, UsageError
from mergequant.grids.codebook import LARGEST_INDEX_BITS
from mergequant.solvers import (
    CodebookSolution,
    InverseFactor,
    Section,
    allocate_channels,
    allocate_greedily,
    channel_levels,
    invert_hessian,
    outlier_mask,
    tune_books,
    vector_gptq,
)
from mergequant.steps.base import SiteStep
from mergequant.steps.rounding import held_out_error, replace_modules
from mergequant.transforms import FloatScheme

__all__ = ["RoundChannels", "RoundCodebooks", "RoundVectors"]

LOG = logging.getLogger("mergequant")


@dataclass(frozen=True)
class RoundCodebooks(SiteStep, ABC):
    """What rounding to codebooks shares: one Hessian for a site, books of its own for every linear.

    Attributes:
        damping, activation_order: of the sweep, as in GPTQ.
        iterations: most rounds of k-means.
    """

    damping: float = 0.01
    activation_order: bool = True
    iterations: int = 100

    @property
    @abstractmethod
    def bits_per_weight(self) -> float:
        """Bits of an index, shared out among the weights that it stands for; without books."""

    @property
    @abstractmethod
    def scheme(self) -> str:
        """The weights' scheme in words, for a plan."""

    @abstractmethod
    def solve(self, weight: Tensor, gram: Tensor, inverse: InverseFactor) -> CodebookSolution:
        """One weight (outputs, width), coded; `gram` (width, width) is that of its inputs."""

    def run(self, context: SiteContext) -> None:
        if not isinstance(context.scheme, FloatScheme):
            raise RecipeError(
                f"{context.name}: weights in codebooks decode to floating point, which no integer GEMM multiplies; "
                "leave out the steps that quantize inputs"
            )
        context.targets = dict(context.weights)
        gram = context.gram().total
        inverse = invert_hessian(gram, damping=self.damping, activation_order=self.activation_order)
        solutions: dict[str, CodebookSolution] = {}
        bits = weights = 0
        for name, weight in context.weights.items():
            full = f"{context.block.name}.{name}"
            context.block.progress(f"{full}: codebooks")
            try:
                solutions[name] = self.solve(weight, gram, inverse)
            except UsageError as error:
                raise RecipeError(f"{full}: {error}") from error
            made = solutions[name].quantized
            bits, weights = bits + made.stored_bits(), weights + weight.numel()
            if made.oversized:
                LOG.warning(
                    "%s: its codebooks are larger than the indices they serve: %.2f bits a weight, all counted; use "
                    "fewer bits an index, shorter vectors or fewer groups",
                    full,
                    made.bits_per_element(),
                )
        context.solutions = solutions
        context.report(damping=inverse.damping, cholesky_attempts=float(inverse.attempts), stored_bits=bits / weights)
        context.report(output_error=held_out_error(context))
        replace_modules(context, 0, 0)


@dataclass(frozen=True)
class RoundVectors(RoundCodebooks):
    """Vectors along the outputs of one column, coded by k-means, with error feedback column by column (VPTQ).

    Attributes:
        vector: outputs that share an index; outputs are padded to a multiple.
        bits: of an index; a codebook has 2^bits entries.
        residual_bits: of a second index, whose entry is added; 0 = none.
        groups: codebooks, each for an equal run of the sweep's columns.
        outlier_share: of the columns, the strongest ones first, that get a codebook of their own, with the columns that
            groups leave over; 0 = none.
        outlier_vector, outlier_bits: vector and index of these.
        tune: "adam" moves the centroids against the layer's output error, as in the paper's layer-wise fine-tuning;
            "least_squares" finds their best by conjugate gradients; "none".
        tune_steps, tune_rate: iterations, and Adam's rate.
    """

    name: ClassVar[str] = "round_vectors"
    vector: int = 6
    bits: int = 12
    residual_bits: int = 0
    groups: int = 1
    outlier_share: float = 0.0
    outlier_vector: int = 4
    outlier_bits: int = 12
    tune: Literal["none", "adam", "least_squares"] = "none"
    tune_steps: int = 100
    tune_rate: float = 1e-4

    def __post_init__(self) -> None:
        if min(self.vector, self.outlier_vector, self.groups) < 1 or not 0 <= self.outlier_share < 1:
            raise RecipeError(f"round_vectors: vectors and groups must be positive, outlier_share in [0, 1): {self}")
        known = range(1, LARGEST_INDEX_BITS + 1)
        if self.bits not in known or self.outlier_bits not in known or self.residual_bits not in (0, *known):
            raise RecipeError(f"round_vectors: indices have 1 to {LARGEST_INDEX_BITS} bits (no residual: 0)")

    @property
    def bits_per_weight(self) -> float:
        return (self.bits + self.residual_bits) / self.vector

    @property
    def scheme(self) -> str:
        residual = f"+{self.residual_bits}" if self.residual_bits else ""
        return f"codebooks, {self.bits}{residual} bits for {self.vector} outputs"

    def sections(self, width: int) -> list[Section]:
        """How the columns of a weight are coded, in the order of the sweep."""
        rest = width
        made = []
        if self.outlier_share:
            outliers = math.ceil(width * self.outlier_share)
            outliers += (width - outliers) % self.groups
            made.append(Section(outliers, self.outlier_vector, self.outlier_bits))
            rest -= outliers
        if rest:
            made.append(Section(rest, self.vector, self.bits, self.residual_bits, self.groups))
        return made

    def solve(self, weight: Tensor, gram: Tensor, inverse: InverseFactor) -> CodebookSolution:
        energy = torch.diagonal(gram)
        sections = self.sections(weight.shape[1])
        solution = vector_gptq(weight, inverse, energy, sections, iterations=self.iterations)
        tuned = tune_books(solution.quantized, weight, gram, self.tune, self.tune_steps, self.tune_rate)
        return replace(solution, quantized=tuned)


@dataclass(frozen=True)
class RoundChannels(RoundCodebooks):
    """Widths by input channel, levels by k-means in every column, and values that are kept in 16 bits (CMPQ).

    Attributes:
        average_bits: of a weight, without levels and outliers; any number from `least` to `most`.
        least, most: widths to choose from.
        allocation: "norms": the strongest channels get more; "greedy": those that save the most error.
        swap: at a whole average, share of channels that get a bit more, and of channels that get one less; it is left
            out where norms are flat.
        sensitive, active: shares of values that are kept: the largest, and those of the largest |value| times norm.
        feedback: GPTQ's error feedback between columns.
    """

    name: ClassVar[str] = "round_channels"
    average_bits: float = 3.0
    least: int = 2
    most: int = 4
    allocation: Literal["norms", "greedy"] = "norms"
    swap: float = 0.1
    sensitive: float = 0.0045
    active: float = 0.0005
    feedback: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.average_bits <= self.most <= LARGEST_INDEX_BITS:
            raise RecipeError(
                f"round_channels: an average of {self.average_bits} bits cannot be met with widths of {self.least} to "
                f"{self.most} bits; choose an average between them, or other least and most"
            )
        if not 0 <= self.swap <= 0.5 or min(self.sensitive, self.active) < 0 or self.sensitive + self.active >= 1:
            raise RecipeError("round_channels: swap is in [0, 0.5], sensitive and active are shares of all values")

    @property
    def bits_per_weight(self) -> float:
        return self.average_bits

    @property
    def scheme(self) -> str:
        return f"levels by column, {self.average_bits:g} bits on average, widths by {self.allocation}"

    def solve(self, weight: Tensor, gram: Tensor, inverse: InverseFactor) -> CodebookSolution:
        energy, widths = torch.diagonal(gram), {"least": self.least, "most": self.most}
        if self.allocation == "norms":
            bits = allocate_channels(energy, self.average_bits, swap=self.swap, **widths)
        else:
            bits = allocate_greedily(weight, energy, self.average_bits, **widths)
        kept = outlier_mask(weight, energy, self.sensitive, self.active)
        return channel_levels(
            weight, energy, bits, kept, inverse if self.feedback else None, iterations=self.iterations
        )
