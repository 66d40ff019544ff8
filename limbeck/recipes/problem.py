"""What is wrong with a recipe: every problem with its place, and an error that carries all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from limbeck.core.errors import ConfigError, LimbeckError

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Problem:
    """One mistake in a recipe.

    Args:
        message: What is wrong.
        where: Its place as a dotted path, such as ``"loss.kd.temperature"``; empty for the file as a whole.
        line: Line in the file, counted from 1; ``None`` where it was not written in a file.
        column: Column, where it is known to matter (broken YAML).
        found: What was there.
        wanted: What should have been there.
        remedy: What to do.
    """

    message: str
    where: str = ""
    line: int | None = None
    column: int | None = None
    found: str | None = None
    wanted: str | None = None
    remedy: str | None = None

    @classmethod
    def of(cls, error: LimbeckError, where: str, line: int | None) -> Problem:
        """A limbeck error as a problem of this place. What the error itself calls its place goes into the message."""
        own = error.where
        inside = own is not None and not where.startswith(own) and not where.endswith("." + own)
        return cls(
            f"{own}: {error.message}" if inside else error.message,
            where,
            line,
            None,
            None if error.found is None else str(error.found),
            None if error.wanted is None else str(error.wanted),
            error.remedy,
        )

    def as_dict(self) -> dict[str, Any]:
        """Its facts, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        at = (
            ""
            if self.line is None
            else f"line {self.line}" + ("" if self.column is None else f", column {self.column}")
        )
        parts = [": ".join(part for part in (at, self.where, self.message) if part)]
        if self.found is not None:
            parts.append(f"found {self.found}")
        if self.wanted is not None:
            parts.append(f"wanted {self.wanted}")
        if self.remedy is not None:
            parts.append(self.remedy)
        return "; ".join(parts)


class RecipeError(ConfigError):
    """A recipe with mistakes.

    Args:
        problems: All that were found.
        name: Of the recipe: its file or its shipped name.
    """

    def __init__(self, problems: Sequence[Problem], name: str) -> None:
        self.problems, self.name = list(problems), name
        count = f"{len(problems)} mistakes" if len(problems) != 1 else "one mistake"
        super().__init__("\n".join([f"{count} in this recipe", *(f"  {p}" for p in problems)]), where=name)


def dotted(key: Key) -> str:
    """A place as people write it.

    >>> dotted(("data", "augment", 1, "cutout"))
    'data.augment[1].cutout'
    """
    text = ""
    for step in key:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else str(step)
    return text
