"""How many floating-point operations training takes: counted on a stage's first steps, for the whole of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from limbeck.core.batch import Batch
from limbeck.core.distiller import Distiller
from limbeck.core.teacher import FrozenTeacher, teacher_inputs
from limbeck.core.trace import Trace
from limbeck.models.describe import flops

COUNTED = 4  # steps; those of one stage differ little, but for schemes that throw dice


class Operations:
    """Floating-point operations of a stage, by who took them. What torch has no formula for counts nothing.

    Args:
        counted: Steps that were counted.
        whole: Operations of those: both models', forward and backward, and all else that a step computes.
        teacher: The teacher's part.
    """

    def __init__(self, counted: int = 0, whole: float = 0.0, teacher: float = 0.0) -> None:
        self.counted, self.whole, self.teacher = counted, whole, teacher

    @classmethod
    def estimated(cls, distiller: Distiller, example: Batch, samples: float) -> Operations:
        """Of compiled steps, into which nobody can look; see :func:`estimate`."""
        whole, teacher = estimate(distiller, example, samples)
        return cls(COUNTED, COUNTED * whole, COUNTED * teacher)

    @contextlib.contextmanager
    def counting(self, distiller: Distiller) -> Iterator[None]:
        """Count what is computed within, as one step, until there were enough of them."""
        if self.counted >= COUNTED:
            yield
            return
        ask = distiller._teach
        with FlopCounterMode(display=False) as counter:

            def asked(batch: Batch) -> Trace:
                before = counter.get_total_flops()
                try:
                    return ask(batch)
                finally:
                    self.teacher += counter.get_total_flops() - before

            distiller.__dict__["_teach"] = asked
            try:
                yield
            finally:
                distiller.__dict__.pop("_teach", None)
        self.whole += counter.get_total_flops()
        self.counted += 1

    def of(self, steps: int) -> dict[str, float]:
        """Of so many steps: ``total`` and, of that, ``teacher``."""
        share = steps / max(self.counted, 1)
        return {"total": self.whole * share, "teacher": self.teacher * share}


def estimate(distiller: Distiller, example: Batch, samples: float) -> tuple[float, float]:
    """Operations of a step by its forwards alone (a backward counts as two), and the teacher's part of them.

    A model that no term taps is not run, and does not count.

    Args:
        distiller: Set up.
        example: A small batch.
        samples: Samples of a step.
    """
    own = 3.0 * flops(distiller.student, example.inputs) if distiller.loss.student_taps else 0.0
    known = isinstance(distiller.teacher, FrozenTeacher) and distiller.loss.teacher_taps
    model: Any = getattr(distiller.teacher, "model", None)
    other = float(flops(model, teacher_inputs(example))) if known else 0.0
    share = samples / example.size
    return (own + other) * share, other * share


def together(parts: list[dict[str, float]]) -> dict[str, float]:
    """The operations of several stages or trainings.

    >>> together([{"total": 3.0, "teacher": 1.0}, {"total": 2.0, "teacher": 0.0}])
    {'total': 5.0, 'teacher': 1.0}
    """
    return {name: sum(part.get(name, 0.0) for part in parts) for name in ("total", "teacher")}
