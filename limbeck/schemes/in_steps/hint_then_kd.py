"""Two stages: hints train the lower part of the student, or its helpers, then the other terms train the whole."""

from __future__ import annotations

from typing import Any

from torch import nn

from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Objective, Terms
from limbeck.core.reduction import check_inside, check_positive
from limbeck.core.teacher import Teacher
from limbeck.engine.config import TrainConfig
from limbeck.engine.stage import Stage
from limbeck.objectives.feature.fitnets import FitNets
from limbeck.objectives.parts.hints import TeacherDecay
from limbeck.objectives.response.cross_entropy import CrossEntropy
from limbeck.objectives.response.kd import KD
from limbeck.schemes.parts.two_stages import two_configs
from limbeck.schemes.scheme import StagedScheme, register


@register("hint_then_kd")
class HintThenKD(StagedScheme):
    r"""Two stages: ``hint`` prepares, ``distill`` trains the whole student. Made for FitNets; others open so, too.

    The first stage has no labels. Its loss is what the terms of the loss that is given open with
    (``Objective.opening``), without their weight: hints, activation boundaries and flow matrices themselves, which the
    second stage then goes on without; the paraphraser's own loss of factor transfer, which goes on with the trained
    paraphraser. Where no term opens, ``FitNets(tap, teacher_tap)`` does. The student trains up to the deepest layer
    that is asked for, and nothing of it where only the teacher is; helpers of terms that do not go on are dropped.

    The second stage has the other terms; where there are none, cross-entropy. Hints of FitNets without a further term
    that asks the teacher get the paper's own, :math:`\lambda H(p_t^\tau, p_s^\tau)` with :math:`\lambda` falling from 4
    to 1 (``TeacherDecay``). The paper has no factor :math:`\tau^2` there, so the weight of ``KD``, which has it, is
    divided by it.

    Both stages together take the epochs or steps of the settings, so that runs with other schemes compare. The first
    stage's validation judges its own loss, since the head has learned nothing yet.

    Args:
        share: Of the training, for the first stage. FitNets trains until the hints stop improving; a quarter is our
            choice.
        tap: The student's guided layer, where no term of the loss opens.
        teacher_tap: The teacher's hint layer, where it is called otherwise.
        temperature: :math:`\tau` of FitNets' second stage.

    Source: FitNets: Hints for Thin Deep Nets, 2015, arXiv 1412.6550.

    >>> from limbeck.models import create
    >>> scheme = HintThenKD()
    >>> first, second = scheme.stages(create("resnet8"), FitNets(), create("resnet14"), TrainConfig(epochs=8))
    >>> (first.name, first.config.epochs, first.learn_to), (second.name, second.config.epochs)
    (('hint', 2, 'stages:-2'), ('distill', 6))
    >>> list(second.distiller.loss.names)
    ['cross_entropy', 'kd']
    """

    def __init__(
        self, share: float = 0.25, tap: str = "stages:-2", teacher_tap: str | None = None, temperature: float = 3.0
    ) -> None:
        check_inside(share, "scheme.share")
        check_positive(temperature, "scheme.temperature")
        self.share, self.tap, self.teacher_tap, self.temperature = share, tap, teacher_tap, temperature

    def stages(
        self,
        student: nn.Module,
        loss: Objective | Terms | None,
        teacher: nn.Module | Teacher | None,
        config: TrainConfig,
        *,
        logits: str | None = None,
    ) -> list[Stage]:
        if teacher is None:
            raise ConfigError("hints need a teacher", where="teacher", found="none")
        first, second = two_configs(config, self.share)
        terms = [] if loss is None else list(Terms.of(loss).items())
        # Asked once: an objective may go on otherwise from then on.
        openings = [(opening, *term) for term in terms for opening in [term[1].opening()]]
        hints = [opening for opening, *_ in openings if opening is not None] or [FitNets(self.tap, self.teacher_tap)]
        others = [term for opening, *term in openings if opening is not term[1]]
        rest = _sum(others) if others else Terms.of(CrossEntropy())
        if any(isinstance(hint, FitNets) for hint in hints) and not rest.teacher_taps:
            rest = rest + TeacherDecay() * (1 / self.temperature**2) * KD(self.temperature)
        taps = [tap for hint in hints if hint.trains_student for tap in hint.student_taps]
        opening = Distiller(student, sum(hints[1:], Terms.of(hints[0])), teacher, logits=logits)
        return [
            Stage("hint", opening, first, ("*",) if taps else (), learn_to=taps[0] if len(taps) == 1 else None),
            Stage("distill", Distiller(student, rest, teacher, logits=logits), second),
        ]


def _sum(terms: list[list[Any]]) -> Terms:
    """Name, objective and weight of each, as one sum."""
    names, objectives, weights = (list(column) for column in zip(*terms, strict=True))
    return Terms(objectives, weights, names)
