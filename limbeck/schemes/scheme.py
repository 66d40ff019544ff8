"""What a scheme is, and how one is found by its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import BaseModel
from torch import nn

from limbeck.core.catalogue import check_options, options_of
from limbeck.core.errors import ConfigError, did_you_mean
from limbeck.core.objective import Objective, Terms
from limbeck.core.teacher import Teacher
from limbeck.engine.config import TrainConfig
from limbeck.engine.stage import Stage


class Scheme(ABC):
    """Turns models and losses into the stages of a run. Its options are its constructor's."""

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


_schemes: dict[str, type[Scheme]] = {}
S = TypeVar("S", bound=type[Scheme])


def register(key: str) -> Callable[[S], S]:
    """Put a scheme into the list under its name in recipes."""

    def add(cls: S) -> S:
        known = _schemes.get(key)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ConfigError("two schemes have this key", where=key, found=f"{known.__module__} and {cls.__module__}")
        _schemes[key] = cls
        return cls

    return add


def schemes() -> dict[str, type[Scheme]]:
    """Every scheme by key."""
    return dict(sorted(_schemes.items()))


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
