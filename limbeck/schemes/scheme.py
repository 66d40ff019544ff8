"""What a scheme is, and how one is found by its name."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel
from torch import nn

from limbeck.core.catalogue import Card, Method, check_options, options_of
from limbeck.core.errors import ConfigError, did_you_mean
from limbeck.core.objective import Objective, Terms
from limbeck.core.teacher import Teacher
from limbeck.data.loader import Loader
from limbeck.engine.config import TrainConfig
from limbeck.engine.stage import Stage


@dataclass
class Cast:
    """Who and what a scheme has to work with.

    Args:
        student: Who is wanted in the end.
        loss: By what it learns from a teacher.
        teacher: From whom, if from anybody; of several, where no one was said to be it, all of them together.
        teachers: All teachers by name, for schemes of several.
        config: How one training goes.
        train: What is learned from.
        validation: What is judged by.
        players: Further models by name, such as assistants and peers.
        fresh: Makes another student with a random start of its own, from a number that tells them apart.
        logits: Where logits stand in the student's output.
        seed: Of everything random.
        folder: Of the run, for what a scheme keeps beside its trainings; ``None``: it has none.
    """

    student: nn.Module
    loss: Terms
    teacher: Teacher | None
    config: TrainConfig
    train: Loader | None = None
    validation: Loader | None = None
    teachers: Mapping[str, Teacher] = field(default_factory=dict)
    players: Mapping[str, nn.Module] = field(default_factory=dict)
    fresh: Callable[[int], nn.Module] | None = None
    logits: str | None = None
    seed: int = 0
    folder: Path | None = None

    def player(self, name: str) -> nn.Module:
        """A further model.

        Raises:
            ConfigError: There is none of this name.
        """
        if name not in self.players:
            raise ConfigError(
                "the scheme asks for a model that is not there",
                where=f"players.{name}",
                found=f"players {', '.join(self.players) or 'none'}",
                remedy=did_you_mean(name, self.players) or f"add players: {{{name}: {{model: ...}}}} to the recipe",
            )
        return self.players[name]

    def another(self, number: int) -> nn.Module:
        """Another student, freshly drawn.

        Raises:
            ConfigError: Nobody said how one is made.
        """
        if self.fresh is None:
            raise ConfigError(
                "this scheme makes further students, and is not told how",
                where="fresh",
                remedy="run a recipe, or give distill(..., fresh=lambda number: MyModel())",
            )
        return self.fresh(number)

    def again(self) -> Terms:
        """The loss anew: its helpers are sized for one pair of models."""
        return copy.deepcopy(self.loss)

    def need_teacher(self, why: str) -> Teacher:
        """The teacher, or an error that says why there must be one."""
        if self.teacher is None:
            raise ConfigError(f"{why} a teacher", where="teacher", found="none")
        return self.teacher

    def need_teachers(self, why: str, least: int = 2) -> dict[str, Teacher]:
        """All teachers by name, or an error that says why there must be so many."""
        if len(self.teachers) < least:
            raise ConfigError(
                f"{why} {least} teachers or more",
                where="teachers",
                found=", ".join(self.teachers) or "none",
                remedy="add teachers: {NAME: {model: ..., train: ...}} to the recipe, or distill(..., teachers={...})",
            )
        return dict(self.teachers)


@dataclass
class Training:
    """One training within a scheme.

    Args:
        stages: Its stages, as ``limbeck.engine.fit`` takes them; they share one student.
        name: Of its folder; empty for that of the student that is wanted in the end, which comes last.
        train: What it learns from, where that is not what the recipe says; or what makes it, called when the training
            begins.
        keeps: What is wanted of it afterwards beside its student, by name.
        judged: The validation data tell how good its student is; not so where it has another task, or other tokens.
    """

    stages: list[Stage]
    name: str = ""
    train: Loader | Callable[[], Loader] | None = None
    keeps: dict[str, nn.Module] = field(default_factory=dict)
    judged: bool = True

    @property
    def student(self) -> nn.Module:
        """Who is trained."""
        return self.stages[0].distiller.student


class Scheme(ABC):
    """Who learns from whom, and when. Its options are its constructor's."""

    card: Card | None = None
    #: It makes its teacher itself: where the recipe has none (``"may"``), or always, and refuses another (``"only"``).
    own_teacher: Literal["no", "may", "only"] = "no"

    @abstractmethod
    def trainings(self, cast: Cast) -> Iterator[Training]:
        """One training after the other; when the next is asked for, the last one is done.

        A model that was trained before may teach in the next, be measured, averaged or thrown away. In a resumed run
        the trainings that were finished are not done again: their models have the weights they ended with.

        Args:
            cast: Models, loss, data and settings.
        """


class StagedScheme(Scheme):
    """A scheme of one training, in one or more stages."""

    @abstractmethod
    def stages(
        self,
        student: nn.Module,
        loss: Objective | Terms,
        teacher: nn.Module | Teacher | None,
        config: TrainConfig,
        *,
        logits: str | None = None,
    ) -> list[Stage]:
        """The stages, ready for ``limbeck.engine.fit``.

        Args:
            student: Who learns.
            loss: By what.
            teacher: From whom.
            config: How; its epochs or steps are those of all stages together.
            logits: Where logits stand in the student's output.
        """

    def trainings(self, cast: Cast) -> Iterator[Training]:
        yield Training(self.stages(cast.student, cast.loss, cast.teacher, cast.config, logits=cast.logits))


_schemes: dict[str, type[Scheme]] = {}
S = TypeVar("S", bound=type[Scheme])


def register(key: str | Card) -> Callable[[S], S]:
    """Put a scheme into the list under its name in recipes; one with a card stands in the catalogue too."""
    card = key if isinstance(key, Card) else None
    name = key.key if isinstance(key, Card) else key

    def add(cls: S) -> S:
        known = _schemes.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError("two schemes have this key", where=name, found=f"{known.__module__} and {cls.__module__}")
        _schemes[name] = cls
        if card is not None:
            cls.card = card
        return cls

    return add


def schemes() -> dict[str, type[Scheme]]:
    """Every scheme by key."""
    return dict(sorted(_schemes.items()))


def carded() -> dict[str, Method]:
    """The schemes that are published methods, as entries of the catalogue."""
    return {key: Method(cls.card, cls, None, {}) for key, cls in schemes().items() if cls.card is not None}  # type: ignore[arg-type]


def options(key: str, where: str = "scheme") -> type[BaseModel]:
    """A scheme's options as a strict model, with types and defaults.

    Raises:
        ConfigError: No such scheme.
    """
    return options_of(_get(key, where), key)


def build(key: str, where: str = "scheme", **given: Any) -> Scheme:
    """A scheme by its name, with options.

    Raises:
        ConfigError: No such scheme or option.

    >>> build("hint_then_kd", share=0.5).share
    0.5
    """
    cls = _get(key, where)
    return cls(**check_options(options_of(cls, key), given, where))


def _get(key: str, where: str) -> type[Scheme]:
    if key not in _schemes:
        raise ConfigError(
            "no such scheme",
            where=where,
            found=repr(key),
            wanted=f"one of {', '.join(schemes())}",
            remedy=did_you_mean(key, _schemes),
        )
    return _schemes[key]
