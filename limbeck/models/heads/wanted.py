"""Which head a student needs for what it is to be trained with."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from limbeck.core.batch import Batch
from limbeck.core.errors import ConfigError, TapError
from limbeck.core.objective import Objective
from limbeck.core.roles import resolve
from limbeck.core.survey import Place, survey
from limbeck.models.heads.plan import beside
from limbeck.models.heads.put import kind_of, put_head


def wanted_head(objectives: Iterable[Objective]) -> dict[str, Any] | None:
    """The head that objectives want, with the options that they and the head have in common.

    Raises:
        ConfigError: Two of them want different heads.

    >>> from limbeck.objectives import KD
    >>> wanted_head([KD()]) is None
    True
    """
    wanted = []
    for objective in objectives:
        card = getattr(objective, "card", None)
        if card is not None and card.head is not None:
            own = set(inspect.signature(type(objective)).parameters)
            options = {n: getattr(objective, n) for n in _shared(card.head) if n in own and hasattr(objective, n)}
            wanted.append((card.key, {card.head: options}))
    return one_head(wanted)


def common_options(head: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a method's options that its head has too.

    >>> common_options("reused", {"feature": "pooled", "weight": 2.0})
    {'feature': 'pooled'}
    """
    return {name: options[name] for name in _shared(head) if name in options}


def one_head(wanted: list[tuple[str, dict[str, Any]]]) -> dict[str, Any] | None:
    """The one head that several methods want, or an error that names them."""
    for key, head in wanted[1:]:
        if head != wanted[0][1]:
            raise ConfigError(
                "these methods want different heads, and a student has one",
                where="student.head",
                found=f"{wanted[0][0]}: {wanted[0][1]}, {key}: {head}",
            )
    return wanted[0][1] if wanted else None


def fit_head(model: nn.Module, objectives: Iterable[Objective], *, example: Any, teacher: Any = None) -> None:
    """Put the head on a student that its objectives want, unless it has all the places they listen to already.

    Args:
        model: The student; changed where need be.
        objectives: What it is to be trained with.
        example: Its inputs, or a ``Batch``.
        teacher: Whose classifier may be reused.
    """
    objectives = list(objectives)
    head = wanted_head(objectives)
    if head is None:
        return
    places = survey(model, beside(model, example.inputs if isinstance(example, Batch) else example))
    taps = [t for o in objectives for t in o.student_taps if t.startswith("head.")]
    if not taps or not all(_resolves(tap, places) for tap in taps):
        put_head(model, head, example=example, teacher=teacher)


def _shared(head: str) -> list[str]:
    """The options of a head that a method may have too."""
    return [f.name for f in fields(kind_of(head)) if f.name not in ("layer", "after")]


def _resolves(tap: str, places: dict[str, Place]) -> bool:
    try:
        resolve(tap, places)
    except TapError:
        return False
    return True
