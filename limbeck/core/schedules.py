"""Numbers that change while training goes on: weights, temperatures, mixing shares.

A schedule maps progress (0 at the start of training, 1 at its end) to a value. Values are 0-d tensors computed with
tensor operations, so that a compiled step is not rebuilt when progress moves.

>>> round(float(Linear(1.0, 0.0)(0.25)), 4)
0.75
>>> round(float((2.0 * WarmUp(0.5))(0.25)), 4)
1.0
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from limbeck.core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from limbeck.core.objective import Objective, Terms


@dataclass(frozen=True)
class Schedule:
    """A value that depends on progress. Multiply it with numbers, other schedules, or objectives."""

    known: ClassVar[dict[str, type[Schedule]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Schedule.known[cls.__name__.lower()] = cls

    def at(self, progress: Tensor) -> Tensor:
        """The value at a progress given as a 0-d tensor."""
        raise TypeError(f"{type(self).__name__} does not say its value: define at(progress)")

    def __call__(self, progress: float | Tensor) -> Tensor:
        return self.at(torch.as_tensor(progress, dtype=torch.float32))

    def written(self) -> float | dict[str, Any]:
        """Its form in a recipe, which :func:`parse_schedule` reads back.

        >>> WarmUp(0.25).written()
        {'warmup': {'until': 0.25}}
        """
        return {type(self).__name__.lower(): asdict(self)}

    @overload
    def __mul__(self, other: Objective) -> Terms: ...
    @overload
    def __mul__(self, other: float | Schedule) -> Schedule: ...
    def __mul__(self, other: float | Schedule | Objective) -> Schedule | Terms:
        if isinstance(other, (int, float)):
            return Product(self, Constant(float(other)))
        if isinstance(other, Schedule):
            return Product(self, other)
        return other.__rmul__(self)

    __rmul__ = __mul__


@dataclass(frozen=True)
class Constant(Schedule):
    """Always ``value``."""

    value: float

    def at(self, progress: Tensor) -> Tensor:
        return torch.full_like(progress, self.value)


@dataclass(frozen=True)
class Linear(Schedule):
    """A straight line from ``start`` to ``end``."""

    start: float
    end: float

    def at(self, progress: Tensor) -> Tensor:
        return self.start + (self.end - self.start) * progress


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine wave from ``start`` to ``end``: flat at both ends."""

    start: float
    end: float

    def at(self, progress: Tensor) -> Tensor:
        return self.end + (self.start - self.end) * 0.5 * (1 + torch.cos(torch.pi * progress))


@dataclass(frozen=True)
class WarmUp(Schedule):
    """From 0 to 1 over the first ``until`` of training, then 1."""

    until: float = 0.1

    def at(self, progress: Tensor) -> Tensor:
        return (progress / self.until).clamp(max=1.0) if self.until > 0 else torch.ones_like(progress)


@dataclass(frozen=True)
class Step(Schedule):
    """``value``, multiplied by ``factor`` at each milestone passed (milestones are progress values)."""

    value: float
    milestones: tuple[float, ...]
    factor: float = 0.1

    def at(self, progress: Tensor) -> Tensor:
        passed = sum((progress >= m).to(progress.dtype) for m in self.milestones)
        return self.value * torch.full_like(progress, self.factor) ** passed


@dataclass(frozen=True)
class Exponential(Schedule):
    """From ``start`` to ``end`` at a constant rate: ``start * (end / start) ** progress``."""

    start: float
    end: float

    def __post_init__(self) -> None:
        if self.start * self.end <= 0:
            raise ConfigError(
                "start and end of an exponential schedule have one sign and are not zero",
                where="exponential",
                found=f"start={self.start}, end={self.end}",
            )

    def at(self, progress: Tensor) -> Tensor:
        return self.start * torch.full_like(progress, self.end / self.start) ** progress


@dataclass(frozen=True)
class Product(Schedule):
    """The product of two schedules."""

    first: Schedule
    second: Schedule

    def at(self, progress: Tensor) -> Tensor:
        return self.first.at(progress) * self.second.at(progress)

    def written(self) -> dict[str, Any]:
        return {"product": {"first": self.first.written(), "second": self.second.written()}}


def parse_schedule(value: Any, where: str = "schedule") -> Schedule:
    """A schedule from its written form: a number, or ``{name: {options}}``.

    Raises:
        ConfigError: An unknown schedule or option.

    >>> parse_schedule({"linear": {"start": 1, "end": 0}})
    Linear(start=1.0, end=0.0)
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError("not a number one can weigh with", where=where, found=value)
        return Constant(float(value))
    options = next(iter(value.values())) if isinstance(value, dict) and len(value) == 1 else ""
    if not isinstance(value, dict) or not (options is None or isinstance(options, dict)):
        raise ConfigError(
            "not a schedule", where=where, found=repr(value), wanted="a number, or {name: {options}} with one name"
        )
    name = next(iter(value))
    kind = Schedule.known.get(str(name))
    if kind is None:
        raise ConfigError(
            "no such schedule",
            where=where,
            found=repr(name),
            wanted=f"one of {', '.join(sorted(Schedule.known))}",
            remedy=did_you_mean(str(name), Schedule.known),
        )
    names = [f.name for f in fields(kind)]
    for option in options or {}:
        if option not in names:
            raise ConfigError(
                f"the schedule {name!r} has no such option",
                where=f"{where}.{name}.{option}",
                wanted=f"one of {', '.join(names)}",
                remedy=did_you_mean(str(option), names),
            )
    if kind is Product:
        both = {option: parse_schedule(part, f"{where}.product.{option}") for option, part in (options or {}).items()}
        if both.keys() != {"first", "second"}:
            raise ConfigError("a product has two factors", where=f"{where}.product", wanted="first and second")
        return Product(**both)
    try:
        return TypeAdapter(kind).validate_python(options or {})
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(
            first["msg"], where=".".join([where, str(name), *map(str, first["loc"])]), found=repr(first.get("input"))
        ) from None
