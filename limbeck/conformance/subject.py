"""The objective under test, as something that can be made again and again."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from limbeck.core import catalogue
from limbeck.core.catalogue import Card
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Objective


@dataclass(frozen=True)
class Subject:
    """The objective under test, as something that can be made again and again.

    Args:
        name: What it is called in reports.
        make: Makes a fresh one, not set up; takes options.
        card: Its card, where it has one.
        function: Its pure function, where it has one.
        varied: It may have been made with options of its own, so the card's needs may not be its needs.
    """

    name: str
    make: Callable[..., Objective]
    card: Card | None = None
    function: Callable[..., Any] | None = None
    varied: bool = False

    @classmethod
    def of(cls, target: str | Objective | type[Objective], options: dict[str, Any] | None = None) -> Subject:
        """A subject from a method's key, a class, or an instance."""
        options = options or {}
        if isinstance(target, str):
            method = catalogue.get(target)
            shown = ", ".join(f"{k}={v!r}" for k, v in options.items())
            return cls(
                f"{target}({shown})" if options else target,
                lambda **more: method.build(**{**options, **more}),
                method.card,
                method.function,
                bool(options),
            )
        if inspect.isclass(target) and issubclass(target, Objective):
            make = target
            return cls(make.__name__, lambda **more: make(**{**options, **more}), *_known(make), bool(options))
        if isinstance(target, Objective):
            made = target
            return cls(type(made).__name__, lambda **more: _copy(made, {**options, **more}), *_known(type(made)), True)
        raise ConfigError(
            "nothing that can be checked",
            where="check_objective",
            found=repr(target),
            wanted="a method's key, an Objective, or a class of objectives",
        )

    def needs(self, name: str) -> bool | None:
        """Whether the card says that it needs this; ``None`` where nothing is said."""
        return None if self.card is None or self.varied else name in self.card.needs


def _known(cls: type[Objective]) -> tuple[Card | None, Callable[..., Any] | None]:
    """Card and function of a class that is registered."""
    card = getattr(cls, "card", None)
    method = catalogue.methods().get(card.key) if card is not None else None
    return card, method.function if method is not None else None


def _copy(objective: Objective, options: dict[str, Any]) -> Objective:
    fresh = copy.deepcopy(objective)
    for name, value in options.items():
        setattr(fresh, name, value)
    return fresh
