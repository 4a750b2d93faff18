"""What a choice at a site does to the module behind it: attention, MLP, or what lies between a site and the next norm.

AWQ and Outlier Suppression+ judge scales by the output of the whole module that reads a site, not by the linears one by
one. Here a module ends where the next one begins that reads the residual stream, or with the block; so it is found
without any name. What is compared there contains the residual stream, which is the same on both sides and drops out of
the difference.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from mergequant.calibration import SiteContext
from mergequant.calibration.chain import TOKENS_PER_CHUNK
from mergequant.models import Site

__all__ = ["LinearOutput", "ModuleOutput"]

Values = Callable[[Tensor], Tensor]


class _Reached(Exception):  # noqa: N818
    """Ends a forward pass where the module ends."""


class ModuleOutput:
    """Loss at the output of the module behind a site, relative to how it is now.

    Args:
        context: the site; its block holds its float weights.
        chunks: calibration chunks (of about 4096 tokens) to measure on, evenly spread.
    """

    def __init__(self, context: SiteContext, chunks: int = 1) -> None:
        self._block, self._consumers = context.block, context.site.consumers
        self._begin = _entrance(context.site)
        chain = context.block.chain
        numbers = chain.numbers("calibration")
        count = min(chunks, len(numbers))
        self._hidden = [chain.hidden[numbers[(2 * i + 1) * len(numbers) // (2 * count)]] for i in range(count)]
        sites = context.block.structure.sites
        later = [site for site in sites[sites.index(context.site) + 1 :] if site.begins_module]
        self._end = _entrance(later[0]) if later else None
        self._before = [self._parts_before(hidden) for hidden in self._hidden]
        self._targets = list(self._outputs())

    def loss(self, weights: Mapping[str, Tensor], values: Values | None = None) -> float:
        """Mean squared change of the output with other weights of the consumers and another form of their input.

        Args:
            weights: by consumer, (outputs, width), for the input as it comes.
            values: what the consumers see in the place of their input (tokens, width) (None = the input itself).
        """
        with self._changed(weights, values):
            errors = [
                float((output - target).float().square().mean())
                for output, target in zip(self._outputs(), self._targets)
            ]
        return sum(errors) / len(errors)

    def rebase(self, weights: Mapping[str, Tensor]) -> None:
        """Measure against the output with these weights of the consumers from now on."""
        with self._changed(weights, None):
            self._targets = list(self._outputs())

    def _outputs(self) -> Iterator[Tensor]:
        for hidden, before in zip(self._hidden, self._before):
            yield self._run(hidden, before)

    @torch.no_grad()
    def _run(self, hidden: Tensor, before: Mapping[str, Any]) -> Tensor:
        with ExitStack() as stack:
            for name, output in before.items():
                part = self._block.module.get_submodule(name)
                own = part.__dict__.get("forward")
                stack.callback(_restore_forward, part, own)
                part.forward = _giving(output)
            if self._end is None:
                return self._block.chain.run(hidden)
            seen = stack.enter_context(_stopped_at(self._block.module.get_submodule(self._end)))
            with suppress(_Reached):
                return self._block.chain.run(hidden)
        return seen[0]

    @torch.no_grad()
    def _parts_before(self, hidden: Tensor) -> dict[str, Any]:
        """What the block's parts give that are done before the site begins: they need not run for each candidate."""
        done: dict[str, list[Any]] = {}
        with ExitStack() as stack:
            for name, part in self._block.module.named_children():

                def keep(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
                    done.setdefault(name, []).append(output)

                stack.callback(part.register_forward_hook(keep).remove)
            stack.enter_context(_stopped_at(self._block.module.get_submodule(self._begin)))
            with suppress(_Reached):
                self._block.chain.run(hidden)
        return {name: outputs[0] for name, outputs in done.items() if len(outputs) == 1}

    @contextmanager
    def _changed(self, weights: Mapping[str, Tensor], values: Values | None) -> Iterator[None]:
        """Weights are put in place whole and the old parameters put back, so that nothing of a candidate is left."""
        with ExitStack() as stack:
            for name in self._consumers:
                linear = self._block.linear(name)
                stack.callback(setattr, linear, "weight", linear.weight)
                linear.weight = nn.Parameter(weights[name].to(linear.weight), requires_grad=False)
                if values is not None:
                    stack.callback(linear.register_forward_pre_hook(_replacing(values)).remove)
            yield


def _entrance(site: Site) -> str:
    """Name of the module where what a site feeds begins."""
    return site.norm.name if site.norm is not None else site.consumers[0]


@contextmanager
def _stopped_at(module: nn.Module) -> Iterator[list[Tensor]]:
    """Ends a forward pass by `_Reached` where a module begins; gives a list that then holds its input."""
    seen: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    handle = module.register_forward_pre_hook(stop)
    try:
        yield seen
    finally:
        handle.remove()


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *_args, **_kwargs: output


def _restore_forward(module: nn.Module, own: Any) -> None:
    module.__dict__.pop("forward", None)
    if own is not None:
        module.forward = own


class LinearOutput:
    """Loss at the output of the site's own linears: what a module comes down to where it is one linear (o_proj).

    Args:
        context: the site.
        chunks: how many chunks' worth of calibration tokens to measure on.
    """

    def __init__(self, context: SiteContext, chunks: int = 1) -> None:
        self._weights = dict(context.weights)
        self._inputs = context.sample("calibration", chunks * TOKENS_PER_CHUNK)

    def rebase(self, weights: Mapping[str, Tensor]) -> None:
        """As `ModuleOutput.rebase`."""
        self._weights = dict(weights)

    def loss(self, weights: Mapping[str, Tensor], values: Values | None = None) -> float:
        """As `ModuleOutput.loss`."""
        seen = self._inputs if values is None else values(self._inputs)
        losses = [
            float((seen @ weights[name].t() - self._inputs @ weight.t()).square().mean())
            for name, weight in self._weights.items()
        ]
        return sum(losses) / len(losses)


def _replacing(values: Values) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return values(args[0].float()).to(args[0]), *args[1:]

    return hook
