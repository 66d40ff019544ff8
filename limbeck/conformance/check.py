"""What a check is, and the list of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from limbeck.conformance.case import Case

Rule = Callable[[Case], str | None]


class Failure(Exception):
    """What a check found, in one sentence."""


@dataclass(frozen=True)
class Check:
    """One promise, checked.

    Args:
        name: What it is called in reports and in ``only``.
        run: Raises ``Failure`` with what was found.
        unless: Says why the check has nothing to look at, or ``None`` where it has.
        once: In the first setting only: it says nothing new in others, or costs too much.
        after: Checks whose failure would make this one fail too; then it is not judged.
    """

    name: str
    run: Callable[[Case], None]
    unless: Rule
    once: bool
    after: tuple[str, ...]

    @property
    def group(self) -> str:
        """The module it stands in."""
        return self.run.__module__

    @property
    def promise(self) -> str:
        """What it checks, in a sentence."""
        return (self.run.__doc__ or "").strip().splitlines()[0]


def check(
    unless: Rule = lambda case: None, *, once: bool = False, after: tuple[str, ...] = ()
) -> Callable[[Callable[[Case], None]], Check]:
    """Make a check of a function, under the function's name."""
    return lambda run: Check(run.__name__, run, unless, once, after)


def require(holds: bool, found: str) -> None:
    """Fail with what was found unless something holds."""
    if not holds:
        raise Failure(found)
