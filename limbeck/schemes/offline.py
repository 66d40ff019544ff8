"""Offline distillation: a finished teacher, one stage."""

from __future__ import annotations

from torch import nn

from limbeck.core.distiller import Distiller
from limbeck.core.objective import Objective, Terms
from limbeck.core.teacher import Teacher
from limbeck.engine.config import TrainConfig
from limbeck.engine.stage import Stage
from limbeck.schemes.scheme import StagedScheme, register


@register("offline")
class Offline(StagedScheme):
    """The usual scheme: the teacher is finished and frozen, the student learns from it from beginning to end.

    >>> from limbeck.objectives import KD
    >>> [s.name for s in Offline().stages(nn.Linear(4, 2), KD(), nn.Linear(4, 2), TrainConfig())]
    ['distill']
    """

    def stages(
        self,
        student: nn.Module,
        loss: Objective | Terms,
        teacher: nn.Module | Teacher | None,
        config: TrainConfig,
        *,
        logits: str | None = None,
    ) -> list[Stage]:
        return [Stage("distill", Distiller(student, loss, teacher, logits=logits), config)]
