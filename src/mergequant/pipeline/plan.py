"""The plan of a run: what would be done to which layer, what it would take, which backend would run it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mergequant import ops
from mergequant.calibration.chain import TOKENS_PER_CHUNK
from mergequant.models import BlockStructure, ModelShell
from mergequant.pipeline.blocks import outside_tensors
from mergequant.recipes import Recipe
from mergequant.steps import (
    AllocateBits,
    Flatten,
    MixHeads,
    Ranges,
    Reassemble,
    Rotate,
    Round,
    RoundCodebooks,
    RoundSparse,
    SiteStep,
    Step,
    TensorInput,
    TokenInput,
)

__all__ = ["Plan", "SitePlan", "make_plan"]

FLOAT32, FLOAT64 = 4, 8
WORKING_COPIES = 8  # of a chunk, of a window's logits, of a Gram matrix: what steps hold at a time, about
PROCESS_BYTES = 400 << 20  # Python with torch and transformers, before anything is loaded
STREAM_FLOPS = 6e10  # float32 multiply-adds a second that two CPU cores reach; a first estimate, replaced when running


@dataclass(frozen=True)
class SitePlan:
    """One site of one block: its linears, their shapes, the names of the steps that act on it, and what these make.

    Attributes:
        weights, inputs: scheme of the linears' weights and of their common input, in words; "float" = left alone.
    """

    block: str
    site: str
    kind: str
    linears: dict[str, tuple[int, ...]]
    steps: tuple[str, ...]
    weights: str
    inputs: str
    static_migration: bool


@dataclass(frozen=True)
class Plan:
    """What `--dry-run` prints.

    Attributes:
        recipe: its name.
        sites: all sites in forward order.
        kept: linears of blocks that stay in floating point, with the reason.
        parameters, linear_parameters: counts of the float model and of the linears to quantize.
        peak_bytes: estimated peak memory of the run.
        disk_bytes: estimated size of the checkpoint.
        seconds: rough estimate on two CPU cores; the progress bar corrects it after the first block.
        backends: op backends here and on GPU architectures.
    """

    recipe: str
    sites: tuple[SitePlan, ...]
    kept: dict[str, str]
    parameters: int
    linear_parameters: int
    peak_bytes: int
    disk_bytes: int
    seconds: float
    backends: tuple[ops.Choice, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **{name: getattr(self, name) for name in ("recipe", "kept", "parameters", "linear_parameters")},
            **{name: getattr(self, name) for name in ("peak_bytes", "disk_bytes", "seconds")},
            "sites": [vars(site) for site in self.sites],
            "backends": [vars(choice) for choice in self.backends],
        }


def make_plan(shell: ModelShell, structures: list[BlockStructure], recipe: Recipe, windows: int, seqlen: int) -> Plan:
    """Plan a run of `recipe` on `windows` windows of `seqlen` tokens."""
    sites: list[SitePlan] = []
    kept: dict[str, str] = {}
    linear_parameters = 0
    largest_block = 0
    widest = 0
    work = 0.0
    tokens = windows * seqlen
    rounding = [step for step in recipe.steps if isinstance(step, (Round, RoundCodebooks))]
    whole = [step for step in recipe.steps if isinstance(step, Flatten)]
    budget = [step for step in recipe.steps if isinstance(step, AllocateBits)]
    for index, structure in enumerate(structures):
        block = shell.block_names[index]
        shapes = shell.block_parameters(index)
        largest_block = max(largest_block, sum(_count(shape) for shape in shapes.values()))
        for site in structure.sites:
            acting = [step for step in recipe.steps if isinstance(step, SiteStep) and step.applies_to(site)]
            linears = {name: shapes[f"{name}.weight"] for name in site.consumers}
            names = tuple(step.name for step in acting)
            scheme = _weight_scheme([*budget, *acting], site.width), _input_scheme([*whole, *acting])
            sites.append(SitePlan(block, site.name, site.kind, linears, names, *scheme, site.producer is not None))
            if not any(step.applies_to(site) for step in rounding):
                kept |= {f"{block}.{name}": "no rounding step acts on its site" for name in linears}
                continue
            widest = max(widest, site.width)
            parameters = sum(_count(shape) for shape in linears.values())
            linear_parameters += parameters
            work += tokens * (4.0 * parameters + 3.0 * site.width**2)
        kept |= {f"{block}.{name}": "its input belongs to no provable site" for name in structure.unserved}
    outside = sum(_count(tuple(tensor.shape)) for tensor in outside_tensors(shell).values())
    in_blocks = sum(_count(shape) for i in range(len(structures)) for shape in shell.block_parameters(i).values())
    hidden = shell.config.get_text_config().hidden_size
    activations = tokens * (hidden + widest) + WORKING_COPIES * TOKENS_PER_CHUNK * widest
    logits = WORKING_COPIES * seqlen * shell.vocabulary
    peak = FLOAT32 * (outside + 3 * largest_block + activations + logits) + FLOAT64 * WORKING_COPIES * widest**2
    peak += PROCESS_BYTES
    bits = max((step.bits if isinstance(step, Round) else step.bits_per_weight for step in rounding), default=16)
    bits = max((step.average_bits for step in budget), default=bits)
    stored = linear_parameters * (bits / 8 + 0.02) + (outside + in_blocks - linear_parameters) * 2
    backends = tuple(choice for name in (None, "sm_80", "sm_89", "sm_90") for choice in ops.explain(name))
    return Plan(
        recipe.name,
        tuple(sites),
        kept,
        outside + in_blocks - shell.untied_parameters,
        linear_parameters,
        int(peak),
        int(stored),
        work / STREAM_FLOPS,
        backends,
    )


def _weight_scheme(acting: Sequence[Step], width: int) -> str:
    last = next((step for step in reversed(acting) if isinstance(step, (Round, RoundCodebooks))), None)
    if last is None:
        return "float"
    if isinstance(last, RoundCodebooks):
        return last.scheme
    group = last.group_of(width)
    level = " in int8 per row" if last.levels == 2 else ""
    level += " with zeros" if last.zeros else ""
    level += " beside outliers" if isinstance(last, RoundSparse) and last.chosen_by != "none" else ""
    budget = next((step.average_bits for step in acting if isinstance(step, AllocateBits)), None)
    codes = f"int{last.bits}" if budget is None else f"integers of {budget:g} bits on average,"
    return f"{codes} {f'groups of {group}' if group else 'per row'}{level}, {last.method}"


def _input_scheme(acting: Sequence[Step]) -> str:
    if not any(isinstance(step, (Round, RoundCodebooks)) for step in acting):
        return "float"
    words = ["Hadamard"] if any(isinstance(step, Rotate) for step in acting) else []
    words += ["Hadamard across heads"] if any(isinstance(step, MixHeads) for step in acting) else []
    for step in acting:
        if isinstance(step, Ranges):
            words.append(f"int{step.bits} static per channel")
        elif isinstance(step, TensorInput):
            words.append(f"int{step.bits} static per tensor")
        elif isinstance(step, Flatten):
            words.append(f"learned transform, int{step.activation_bits} dynamic per token")
        elif isinstance(step, TokenInput):
            words.append(f"int{step.bits} dynamic per token")
        elif isinstance(step, Reassemble):
            words.append(f"int{step.bits} dynamic per token, channels reassembled")
    return ", ".join(words) or "float"


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
