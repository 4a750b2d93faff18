"""Numeric proofs, in float64: what a norm computes, and that a rescaling leaves a block's output as it was.

Model code casts to float32 in places (norms, softmax), which would drown a proof to 1e-10 in rounding. `all_double`
turns those casts into float64 while a probe runs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mergequant.errors import StructureError
from mergequant.models.roles import NormKind, NormRole, Producer, Site

__all__ = ["TOLERANCE", "all_double", "identify_norm", "inputs_edited", "probe", "relative_difference"]

TOLERANCE = 1e-10
MATTERS = 1e-3  # consumers scaled alone must change the output by more than this, or the proof proves nothing

Run = Callable[[nn.Module, torch.Tensor], torch.Tensor]
Edit = Callable[[torch.Tensor], torch.Tensor]

LOW = (torch.float32, torch.bfloat16, torch.float16)
CASTS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)


class _AllDouble(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in CASTS:
            func = torch.Tensor.double
        args = tuple(torch.float64 if any(a is low for low in LOW) else a for a in args)
        named = {k: torch.float64 if any(v is low for low in LOW) else v for k, v in (kwargs or {}).items()}
        return func(*args, **named)


def all_double() -> TorchFunctionMode:
    """A context in which every request for a lower float dtype is served with float64."""
    return _AllDouble()


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|; infinite when anything is not finite."""
    difference = float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))
    return float("inf") if math.isnan(difference) else difference


def identify_norm(name: str, module: nn.Module, width: int, generator: torch.Generator) -> NormRole | None:
    """The role of a norm, proven by running it (its parameters must be float64); None if it is no norm of this width.

    It must hold a weight (width,) and at most a bias (width,) besides, and give what RMSNorm or LayerNorm with
    gain w or 1 + w gives on random rows whose sizes range from far below to far above the square root of eps.
    """
    parameters = dict(module.named_parameters())
    if any(module.children()) or "weight" not in parameters or not parameters.keys() <= {"weight", "bias"}:
        return None
    if any(tuple(parameter.shape) != (width,) for parameter in parameters.values()):
        return None
    weight, bias = parameters["weight"], parameters.get("bias", torch.zeros((), dtype=torch.float64))
    x = torch.randn(9, width, dtype=torch.float64, generator=generator) + 0.5  # a mean tells LayerNorm from RMSNorm
    x = (x * torch.logspace(-5, 3, 9, dtype=torch.float64)[:, None]).to(weight.device)
    with torch.no_grad(), all_double():
        found = module(x)
        if not isinstance(found, torch.Tensor) or found.shape != x.shape:
            return None
        for eps in _eps_candidates(module):
            rms = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            centred = x - x.mean(-1, keepdim=True)
            layer = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
            normed: dict[NormKind, torch.Tensor] = {"rms": rms, "layer": layer}
            for kind, offset in product(normed, (False, True)):
                if _agree(normed[kind] * (weight + float(offset)) + bias, found):
                    return NormRole(name, kind, eps, offset, width)
    return None


def probe(block: nn.Module, site: Site, run: Run, hidden: torch.Tensor, generator: torch.Generator) -> float:
    """Relative change of a block's output when random s in [1/4, 4] moves from a site's consumers to what feeds it.

    The consumers' columns are multiplied by s, and the norm's gain and bias (or the producer's rows) divided; with
    neither, the input of each consumer is. The block's parameters must be float64 and are as before when this returns.
    A structure is right when the result is rounding noise (below `TOLERANCE`). Raises StructureError when even the
    consumers alone can be scaled without effect, so that nothing would be proven.
    """
    feeding = [site.norm.name] if site.norm else [site.producer.rows.linear] if site.producer else []
    device = hidden.device
    if site.producer is not None and site.norm is None:
        rows = site.producer.rows
        factor = _random_scale(rows.stop - rows.start, generator).to(device)
        s = factor[torch.tensor(site.producer.channel, device=device)]
    else:
        factor = s = _random_scale(site.width, generator).to(device)
    before = run(block, hidden)
    with _kept(block, [*site.consumers, *feeding]):
        for name in site.consumers:
            _tensor(block, f"{name}.weight").mul_(s)
        alone = relative_difference(run(block, hidden), before)
        if alone <= MATTERS:
            raise StructureError(
                f"Scaling the inputs of {', '.join(site.consumers)} changes the block's output by only {alone:.1e}, so "
                "nothing can be proven about them: their output does not seem to be used."
            )
        if site.norm is not None:
            _scale_norm(block.get_submodule(site.norm.name), site.norm, s)
        elif site.producer is not None:
            _scale_rows(block, site.producer, factor)
        else:
            with inputs_edited(block, site.consumers, lambda x: x / s):
                return relative_difference(run(block, hidden), before)
        return relative_difference(run(block, hidden), before)


@contextmanager
def inputs_edited(block: nn.Module, names: Sequence[str], edit: Edit) -> Iterator[None]:
    """Let some modules of a block read an edited form of their first argument for a while."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: edit(kwargs[name])}

    handles = [block.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _scale_norm(module: nn.Module, role: NormRole, s: torch.Tensor) -> None:
    role.set_gain(module, role.gain(module) / s)
    bias = role.bias(module)
    if bias is not None:
        role.set_bias(module, bias / s)


def _scale_rows(block: nn.Module, producer: Producer, factor: torch.Tensor) -> None:
    rows = slice(producer.rows.start, producer.rows.stop)
    linear = block.get_submodule(producer.rows.linear)
    _tensor(linear, "weight")[rows].div_(factor[:, None])
    if getattr(linear, "bias", None) is not None:
        _tensor(linear, "bias")[rows].div_(factor)


@contextmanager
def _kept(block: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Bring the parameters of some modules back to their values afterwards."""
    parameters = [p.detach() for name in dict.fromkeys(names) for p in block.get_submodule(name).parameters()]
    values = [parameter.clone() for parameter in parameters]
    try:
        yield
    finally:
        for parameter, value in zip(parameters, values):
            parameter.copy_(value)


def _tensor(module: nn.Module, name: str) -> torch.Tensor:
    return module.get_parameter(name).detach()


def _random_scale(count: int, generator: torch.Generator) -> torch.Tensor:
    """Log-uniform in [1/4, 4]."""
    return torch.exp2(4 * torch.rand(count, dtype=torch.float64, generator=generator) - 2)


def _agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    return all(relative_difference(x, y) < TOLERANCE for x, y in zip(a, b))  # row by row: their sizes differ by 1e8


def _eps_candidates(module: nn.Module) -> list[float]:
    """Small floats among the module's attributes, whatever they are called, and none at all.

    An eps that depends on the dtype (`nn.RMSNorm(eps=None)`) is left out on purpose: float64 proves another function.
    """
    values = [value for value in vars(module).values() if isinstance(value, float) and 0 <= value < 0.1]
    return list(dict.fromkeys([*values, 0.0]))
