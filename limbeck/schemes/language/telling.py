"""A distiller that tells settings of its scheme, for what a resumed run must find the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from limbeck.core.distiller import Distiller
from limbeck.core.teacher import Teacher
from limbeck.schemes.scheme import Cast


class Telling(Distiller):
    """An ordinary distiller in all else.

    Args:
        cast: Student, loss, and where logits stand.
        teacher: From whom, if from anybody.
        facts: Plain values: the settings that make the texts which are trained on.
    """

    def __init__(self, cast: Cast, teacher: Teacher | None, facts: Mapping[str, Any]) -> None:
        super().__init__(cast.student, cast.loss, teacher, logits=cast.logits)
        self.facts = dict(facts)

    def settled(self) -> dict[str, Any]:
        return dict(self.facts)
