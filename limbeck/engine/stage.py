"""A part of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from limbeck.core.distiller import Distiller
from limbeck.engine.config import TrainConfig


@dataclass(frozen=True)
class Stage:
    """A part of a run with its own losses and settings.

    Args:
        name: Its name in logs and messages.
        distiller: Student, losses and teacher; all stages of a run share one student. It is set up when the stage
            begins.
        config: How it trains.
        learn: Patterns over the student's parameter names: what trains here; the rest is frozen.
        learn_to: A tap of the student: of that, only what the tap depends on trains.
    """

    name: str
    distiller: Distiller
    config: TrainConfig = field(default_factory=TrainConfig)
    learn: tuple[str, ...] = ("*",)
    learn_to: str | None = None
