"""Rotation of the residual stream, and of the heads between v_proj and o_proj, fused into the weights (QuaRot)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from mergequant import ops
from mergequant.calibration import SiteContext
from mergequant.errors import StructureError
from mergequant.models import BlockStructure, ModelShell, ModelTransform, OutsideParts, Site
from mergequant.models.roles import SiteKind
from mergequant.steps.base import ModelStep, SiteStep
from mergequant.transforms import Kronecker

__all__ = ["MixHeads", "ResidualRotation", "RotateResidual", "head_width", "whole_heads"]

ROWS_AT_ONCE = 8192  # of an embedding that is rotated in float64
INSTEAD = "Use mergequant-plus, which rotates only inputs of o_proj and down_proj, or gptq"


@dataclass(frozen=True)
class RotateResidual(ModelStep):
    """R1: gains of norms go into the columns of their consumers, then the residual stream is rotated by a randomised
    Hadamard-like rotation of its width, whose signs come from the run's seed; all of it is fused (QuaRot, section 4).

    Attributes:
        heads: rotate the values of each head too (R2): rows of v_proj, columns of o_proj.
    """

    name: ClassVar[str] = "rotate_residual"
    heads: bool = True

    def transform(self, shell: ModelShell, seed: int) -> ModelTransform:
        parts = shell.outside_parts()
        width = parts.norm_role.width
        _require_rms(parts.norm_role.kind, parts.norm_role.bias(parts.norm) is not None, parts.norm_role.name)
        head_width = _head_width(shell) if self.heads else 0
        seen: set[int] = set()
        for index, structure in enumerate(shell.structures):
            if id(structure) not in seen:
                seen.add(id(structure))
                _check_block(shell, index, structure, width, head_width)
        generator = torch.Generator().manual_seed(seed)
        signs = 1 - 2 * torch.randint(2, (width,), generator=generator).double()
        return ResidualRotation(signs.to(shell.device), head_width)


@dataclass(frozen=True)
class ResidualRotation(ModelTransform):
    """x -> x diag(signs) H for the residual stream, v -> v H for the values of each head.

    Attributes:
        signs: float64 (width,), +-1.
        head_width: channels of a value head, 0 = heads are left alone.
    """

    signs: Tensor
    head_width: int = 0

    def hidden(self, hidden: Tensor) -> Tensor:
        """Rotated hidden states; float64 for float64, else float32."""
        return ops.hadamard_transform(hidden * self.signs.to(hidden.dtype))

    def outside(self, parts: OutsideParts) -> None:
        embedding = parts.embedding.get_parameter("weight")
        _rotate_rows(embedding, self, torch.ones_like(self.signs))
        _rotate_rows(parts.head.weight, self, parts.norm_role.gain(parts.norm).double())
        parts.norm_role.set_gain(parts.norm, torch.ones_like(parts.norm.get_parameter("weight")))

    def block(self, index: int, block: nn.Module, structure: BlockStructure) -> None:
        for site in structure.sites:
            linears = [block.get_submodule(name) for name in site.consumers]
            if site.norm is not None:
                norm = block.get_submodule(site.norm.name)
                for linear in linears:
                    _rotate_rows(linear.get_parameter("weight"), self, site.norm.gain(norm).double())
                site.norm.set_gain(norm, torch.ones_like(norm.get_parameter("weight")))
                continue
            for linear in linears:
                for name, parameter in linear.named_parameters():
                    value = parameter.detach().double()
                    parameter.detach().copy_(self.hidden(value.t()).t() if name == "weight" else self.hidden(value))
            if site.kind == "attention_output" and self.head_width:
                self._rotate_heads(index, block, site)

    def _rotate_heads(self, index: int, block: nn.Module, site: Site) -> None:
        if site.producer is None:
            raise StructureError(f"{site.name}: no value projection is proven to feed it")
        for name in site.consumers:
            weight = block.get_submodule(name).get_parameter("weight").detach()
            weight.copy_(self.by_head(weight.double(), index))
        rows = site.producer.rows
        for name, parameter in block.get_submodule(rows.linear).named_parameters():
            part = parameter.detach()[rows.start : rows.stop]
            value = part.double()
            turned = self.by_head(value.t(), index).t() if name == "weight" else self.by_head(value, index)
            part.copy_(turned)

    def by_head(self, value: Tensor, index: int) -> Tensor:
        """Rotate each head's channels along the last axis, in block `index`."""
        return ops.hadamard_transform(value.reshape(*value.shape[:-1], -1, self.head_width)).reshape(value.shape)


def _rotate_rows(weight: Tensor, rotation: ResidualRotation, gain: Tensor) -> None:
    """W <- W diag(gain) R in place, computed in float64, some rows at a time."""
    for part in weight.detach().split(ROWS_AT_ONCE):
        part.copy_(rotation.hidden(part.double() * gain))


@dataclass(frozen=True)
class MixHeads(SiteStep):
    """Rotate across heads online: channel c of all heads by a Hadamard-like rotation of their number.

    Where the values of every head are rotated in the weights (`RotateResidual`), the input of o_proj is then rotated as
    a whole: H_width = (I (x) H_head)(H_heads (x) I), of which only the second factor costs time at run time (QuaRot,
    section 4, "Hadamard heads").
    """

    name: ClassVar[str] = "mix_heads"
    sites: tuple[SiteKind, ...] = ("attention_output",)

    def run(self, context: SiteContext) -> None:
        width = _head_width(context.block.chain.shell)
        if not whole_heads(context.site, width):
            raise StructureError(
                f"{context.name}: its columns are not proven to be whole value heads of {width} channels, so heads "
                "cannot be mixed. Use quarot with heads=online or heads=none"
            )
        matrix = ops.rotation(context.site.width // width).matrix()
        context.flatten(Kronecker(matrix.to(device=context.block.device, dtype=torch.float32)))


def head_width(shell: ModelShell) -> int:
    """Channels of a head, as the config has it."""
    config = shell.config.get_text_config()
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _head_width(shell: ModelShell) -> int:
    width = head_width(shell)
    if width % 2:
        raise StructureError(
            f"value heads of {width} channels: an odd size has no Hadamard rotation. Use quarot with heads=online or "
            "heads=none"
        )
    return width


def _check_block(shell: ModelShell, index: int, structure: BlockStructure, width: int, head_width: int) -> None:
    """Refuse what cannot be rotated, with the reason; the proof that follows would only say that it differs."""
    name, shapes = shell.block_names[index], shell.block_parameters(index)
    known = {f"{linear}.weight" for linear in structure.linears}
    stray = [path for path, shape in shapes.items() if len(shape) > 1 and path not in known]
    if structure.unserved or stray:
        raise StructureError(
            f"{name}: {', '.join([*structure.unserved, *stray][:3])} may read the residual stream but belong to no "
            "proven site (a router or experts?), so it cannot be rotated. Use gptq"
        )
    norms = {f"{site.norm.name}.weight" for site in structure.sites if site.norm is not None}
    for site in structure.sites:
        if site.norm is not None:
            _require_rms(site.norm.kind, f"{site.norm.name}.bias" in shapes, f"{name}.{site.norm.name}")
    post = [
        path
        for path, shape in shapes.items()
        if shape == (width,) and path.endswith("weight") and path not in norms and path not in known
    ]
    if post:
        raise StructureError(
            f"{name}: {', '.join(post)} is the gain of a norm behind a projection, with which a rotation of the "
            f"residual stream does not commute. {INSTEAD}"
        )
    if head_width:
        for site in structure.sites:
            if site.kind == "attention_output" and not whole_heads(site, head_width):
                raise StructureError(
                    f"{name}.{site.name}: its columns are not proven to be whole value heads of {head_width} channels, "
                    "so rotating heads cannot be fused. Use quarot with heads=online or heads=none"
                )


def whole_heads(site: Site, head_width: int) -> bool:
    """Whether a site's columns are whole value heads, one after the other, as far as their producer's rows tell."""
    if site.producer is None or site.width % head_width:
        return False
    channel = torch.tensor(site.producer.channel).reshape(-1, head_width)
    starts = channel[:, :1]
    return bool((starts % head_width == 0).all() and torch.equal(channel, starts + torch.arange(head_width)))


def _require_rms(kind: str, biased: bool, name: str) -> None:
    if kind != "rms" or biased:
        what = "a LayerNorm, which subtracts a mean" if kind != "rms" else "a norm with a bias"
        raise StructureError(
            f"{name} is {what}: it does not commute with a rotation of the residual stream, and models are not "
            f"converted to RMSNorm here. {INSTEAD}"
        )
