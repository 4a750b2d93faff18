"""Cheap registration of ops that have no gradient.

`torch.library.custom_op` wraps every call in Python for autograd and for the version counters of what is mutated: 10 us
per call on the machine of docs/results.md, as much as a small integer product takes, and in an engine that launches
from Python (vLLM's prefill) ten times per decoder layer. Codes have no gradient, so these ops are registered with the
dispatcher directly, which costs 3 us. Everything else that `custom_op` gives (an inferred schema that names what is
mutated, fake versions, tracing by `torch.compile`) stays.
"""

from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch._ops import OpOverload

__all__ = ["Op", "register_mutating_op", "register_op"]

P = ParamSpec("P")
R = TypeVar("R")
Body = TypeVar("Body", bound=Callable[..., Any])

NAMESPACE = "mergequant"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # registrations live as long as this does


class Op(Generic[P, R]):
    """A registered op: called like the function it was made of.

    Attributes:
        overload: `torch.ops.mergequant.<name>.default`, for `torch.library.opcheck` and graphs.
    """

    def __init__(self, body: Callable[P, R], mutates: tuple[str, ...] = ()) -> None:
        name = body.__name__
        schema = torch.library.infer_schema(body, mutates_args=mutates)
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, body, "CompositeExplicitAutograd")
        self.overload: OpOverload = getattr(torch.ops.mergequant, name).default
        self.body = body
        self.__name__, self.__doc__, self.__module__ = name, body.__doc__, body.__module__
        self.__wrapped__ = body  # for inspect.signature and help

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.overload(*args, **kwargs)

    def register_fake(self, fake: Body) -> Body:
        """Decorator for the function that gives shape and dtype of the result without computing it."""
        torch.library.register_fake(f"{NAMESPACE}::{self.__name__}", fake, lib=LIBRARY)
        return fake


def register_op(body: Callable[P, R]) -> Op[P, R]:
    """Decorator: register a function that mutates nothing as `mergequant::<its name>`, for all devices."""
    return Op(body)


def register_mutating_op(*mutates: str) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Decorator: likewise a function that writes into the arguments of these names."""
    return lambda body: Op(body, mutates)
