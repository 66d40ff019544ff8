"""Objectives that compare layers: which layers, and which of the student's answers to which of the teacher's."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.errors import ConfigError
from limbeck.core.objective import Objective
from limbeck.core.pairing import pair_features
from limbeck.core.trace import Trace

Tap = str | list[str]


class LayerObjective(Objective):
    """An objective that listens at one or more layers of both models.

    Args:
        tap: A place, a role (``stages``: its layers are paired by resolution or depth), or a list, paired in order.
        teacher_tap: The teacher's, where they are called otherwise.
    """

    def __init__(self, tap: Tap, teacher_tap: Tap | None = None) -> None:
        super().__init__()
        self.student_taps = (tap,) if isinstance(tap, str) else tuple(tap)
        teacher_tap = tap if teacher_tap is None else teacher_tap
        self.teacher_taps = (teacher_tap,) if isinstance(teacher_tap, str) else tuple(teacher_tap)
        self._own = self.student_taps, self.teacher_taps  # a subclass may list further taps

    def pairs(self, student: Trace, teacher: Trace) -> list[tuple[Tensor, Tensor]]:
        """Student and teacher features, pair by pair; the teacher's carry no gradient.

        Raises:
            ConfigError: Two lists of different lengths.
        """
        own, other = _values(student, self._own[0]), _values(teacher, self._own[1])
        if len(self._own[0]) == len(self._own[1]) == 1:
            pairs = pair_features(own, other)
        elif len(own) == len(other):
            pairs = list(zip(own, other, strict=True))
        else:
            raise ConfigError(
                "layers are paired in order",
                where="teacher_tap",
                found=f"{len(other)} layers",
                wanted=f"{len(own)} as in tap",
            )
        return [(s, t.detach()) for s, t in pairs]

    def pair(self, student: Trace, teacher: Trace) -> tuple[Tensor, Tensor]:
        """The one pair, for objectives that compare a single layer; of a plural role the last pair."""
        return self.pairs(student, teacher)[-1]


def _values(trace: Trace, taps: tuple[str, ...]) -> list[Tensor]:
    values = [trace[tap] for tap in taps]
    return [f for value in values for f in (value if isinstance(value, list) else [value])]
