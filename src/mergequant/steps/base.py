"""Steps: one pass of a recipe over a site or a block. Frozen data that knows how to act on a context.

A recipe is a list of steps. Site steps that stand together run site after site, so that a later site sees the earlier
ones already quantized; a block step runs once for the block, between them.
"""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar, get_args

from mergequant.calibration import BlockContext, SiteContext
from mergequant.errors import RecipeError
from mergequant.models import Site
from mergequant.models.roles import SiteKind

__all__ = ["ALL_SITES", "BlockStep", "SiteStep", "Step", "near_name", "step_from_dict"]

ALL_SITES: tuple[SiteKind, ...] = get_args(SiteKind)
_STEPS: dict[str, type["Step"]] = {}


@dataclass(frozen=True)
class Step:
    """Base of all steps. Subclasses set `name` and register themselves; a name is taken once."""

    name: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            taken = _STEPS.get(cls.name)
            if taken is not None and taken.__qualname__ != cls.__qualname__:
                raise RecipeError(f"step name {cls.name!r} is taken by {taken.__qualname__}; rename {cls.__qualname__}")
            _STEPS[cls.name] = cls

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: {"step": name, parameters...}."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"step": self.name, **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}}


@dataclass(frozen=True)
class SiteStep(Step, ABC):
    """A pass over the sites of some kinds.

    Attributes:
        sites: kinds of site that the step acts on.
    """

    sites: tuple[SiteKind, ...] = ALL_SITES

    def applies_to(self, site: Site) -> bool:
        """Whether the step acts on this site."""
        return site.kind in self.sites

    @abstractmethod
    def run(self, context: SiteContext) -> None:
        """Act on one site."""


@dataclass(frozen=True)
class BlockStep(Step, ABC):
    """A pass over a whole block."""

    @abstractmethod
    def run(self, context: BlockContext) -> None:
        """Act on one block."""


def step_from_dict(data: Any, where: str) -> Step:
    """Build a step from {"step": name, parameters...}.

    Raises:
        RecipeError: an unknown step or key (with the nearest known name), or a value of the wrong type.
    """
    if not isinstance(data, dict) or not isinstance(data.get("step"), str):
        raise RecipeError(f"{where}: a step is a mapping with a key 'step' that names it")
    if data["step"] not in _STEPS:
        raise RecipeError(f"{where}: unknown step {data['step']!r}{near_name(data['step'], _STEPS)}")
    cls = _STEPS[data["step"]]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key == "step":
            continue
        if key not in fields:
            raise RecipeError(f"{where}: step {cls.name!r} has no parameter {key!r}{near_name(key, fields)}")
        values[key] = tuple(value) if isinstance(value, list) else value
    for kind in values.get("sites", ()):
        if kind not in ALL_SITES:
            raise RecipeError(f"{where}: unknown kind of site {kind!r}{near_name(kind, ALL_SITES)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise RecipeError(f"{where}: step {cls.name!r}: {error}") from error


def near_name(word: str, known: Any) -> str:
    """'; did you mean ...?' for a misspelt name, else the list of what there is."""
    near = get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"
