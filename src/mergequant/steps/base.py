"""Steps: one pass of a recipe over a site or a block. Frozen data that knows how to act on a context.

A recipe is a list of steps. Site steps that stand together run site after site, so that a later site sees the earlier
ones already quantized; a block step runs once for the block, between them.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import UnionType
from typing import Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor

from mergequant.calibration import BlockContext, SiteContext, StorePolicy
from mergequant.errors import RecipeError
from mergequant.models import ModelShell, ModelTransform, Site
from mergequant.models.roles import SiteKind

__all__ = [
    "ALL_SITES",
    "BlockStep",
    "LearningStep",
    "MeasuringStep",
    "ModelStep",
    "SiteStep",
    "Step",
    "fitting",
    "near_name",
    "step_from_dict",
]

ALL_SITES: tuple[SiteKind, ...] = get_args(SiteKind)
_STEPS: dict[str, type["Step"]] = {}
_MISFIT = object()
LARGEST_NUMBER = 1e300


@dataclass(frozen=True)
class Step:
    """Base of all steps. Subclasses set `name` and register themselves; a name is taken once."""

    name: ClassVar[str] = ""

    def check(self, shell: ModelShell) -> None:
        """Raise StructureError, naming what works, for a model that the step cannot serve; asked while planning."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            taken = _STEPS.get(cls.name)
            new = f"{cls.__module__}.{cls.__qualname__}"
            if taken is not None and f"{taken.__module__}.{taken.__qualname__}" != new:  # the same = a module reloaded
                raise RecipeError(
                    f"step name {cls.name!r} is taken by {taken.__module__}.{taken.__qualname__}; {new} needs another"
                )
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


@dataclass(frozen=True)
class ModelStep(Step, ABC):
    """A function-preserving change of the whole float model, before any block is quantized. These come first."""

    @abstractmethod
    def transform(self, shell: ModelShell, seed: int) -> ModelTransform:
        """The change, for one model; `seed` is the run's. Raises StructureError, naming a recipe that works."""


@dataclass(frozen=True)
class MeasuringStep(Step, ABC):
    """What calibration windows tell about the whole float model before its first block is quantized."""

    @abstractmethod
    def check(self, shell: ModelShell) -> None:
        """Raise StructureError, naming a recipe that works, for a model that cannot be measured."""

    @abstractmethod
    def measure(
        self, shell: ModelShell, windows: Tensor, policy: StorePolicy, progress: Callable[[str], None]
    ) -> dict[str, Tensor]:
        """What is measured, on the CPU, by names that steps find in `BlockContext.measured`; stored meanwhile.

        Args:
            shell: the model, transformed already; its blocks are empty again afterwards.
            windows: int64 (windows, tokens), of the calibration data.
            policy: where activations may lie.
            progress: told how far it is.
        """


@dataclass(frozen=True)
class LearningStep(ModelStep, ABC):
    """A change of the whole model that begins as `transform` says and is refined by what calibration windows teach."""

    @abstractmethod
    def learn(
        self, shell: ModelShell, windows: Tensor, seed: int, progress: Callable[[str], None]
    ) -> dict[str, Tensor]:
        """What is learned, on the CPU, to be stored while the run goes on; a resumed run reads it back.

        Args:
            shell: the model, changed by `transform` already; its blocks are empty again afterwards.
            windows: int64 (windows, tokens).
            seed: the run's.
            progress: told how far it is.
        """

    @abstractmethod
    def refine(self, shell: ModelShell, learned: Mapping[str, Tensor]) -> ModelTransform:
        """The further change that the learned tensors make."""


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
    fields = {field.name for field in dataclasses.fields(cls)}
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key == "step":
            continue
        if key not in fields:
            raise RecipeError(f"{where}: step {cls.name!r} has no parameter {key!r}{near_name(str(key), fields)}")
        values[key] = fitting(value, hints[key], f"{where}, {cls.name}.{key}")
    return cls(**values)


def fitting(value: Any, hint: Any, where: str) -> Any:
    """A value from YAML or a command line as the type that a parameter asks for: lists become tuples, 0 becomes 0.0.

    Raises:
        RecipeError: it does not fit; the message says what would.
    """
    fitted = _fitted(value, hint)
    if fitted is _MISFIT:
        raise RecipeError(f"{where}: {value!r} does not fit; allowed: {', '.join(_allowed(hint))}")
    return fitted


def _fitted(value: Any, hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value if any(type(value) is type(choice) and value == choice for choice in arguments) else _MISFIT
    if origin in (Union, UnionType):
        return next((found for option in arguments if (found := _fitted(value, option)) is not _MISFIT), _MISFIT)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            return _MISFIT
        items = tuple(_fitted(item, arguments[0]) for item in value)
        return _MISFIT if any(item is _MISFIT for item in items) else items
    if hint is float and type(value) in (int, float):
        return float(value) if abs(value) < LARGEST_NUMBER else _MISFIT  # neither infinite nor NaN
    return value if type(value) is hint else _MISFIT


def _allowed(hint: Any) -> list[str]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return [repr(choice) for choice in arguments]
    if origin in (Union, UnionType):
        return [words for option in arguments for words in _allowed(option)]
    if origin is tuple:
        return [f"a list of {' or '.join(_allowed(arguments[0]))}"]
    return [getattr(hint, "__name__", str(hint))]


def near_name(word: str, known: Any) -> str:
    """'; did you mean ...?' for a misspelt name, else the list of what there is."""
    near = get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}"
