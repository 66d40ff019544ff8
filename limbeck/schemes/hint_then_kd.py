"""FitNets' scheme: hints train the lower part of the student, then the teacher's answers train the whole."""

from __future__ import annotations

from torch import nn

from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Objective, Terms
from limbeck.core.teacher import Teacher
from limbeck.engine.config import TrainConfig
from limbeck.engine.stage import Stage
from limbeck.objectives.feature.fitnets import FitNets, TeacherDecay
from limbeck.objectives.response.cross_entropy import CrossEntropy
from limbeck.objectives.response.kd import KD
from limbeck.schemes.scheme import Scheme, register


@register("hint_then_kd")
class HintThenKD(Scheme):
    r"""Two stages: ``hint`` trains the student up to its guided layer, and the regressor; ``distill`` trains it all.

    The hint stage has no labels, and neither model runs further than its tap. Its loss are the ``fitnets`` terms of the
    loss that is given, without their weight, or else ``FitNets(tap, teacher_tap)``. The regressor is dropped after it.

    The second stage has the other terms. Where none of them asks the teacher, the paper's is added,
    :math:`\lambda H(p_t^\tau, p_s^\tau)` with :math:`\lambda` falling from 4 to 1 (``TeacherDecay``); where there is no
    other term at all, cross-entropy too. The paper has no factor :math:`\tau^2` there, so the weight of ``KD``, which
    has it, is divided by it.

    Both stages together take the epochs or steps of the settings, so that runs with other schemes compare. The hint
    stage's validation judges its own loss, since the head has learned nothing yet.

    Args:
        share: Of the training, for the hint stage. The paper trains until the hints stop improving; a quarter is our
            choice.
        tap: The student's guided layer.
        teacher_tap: The teacher's hint layer, where it is called otherwise.
        temperature: :math:`\tau` of the paper's second stage.

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
        if not 0 < share < 1:
            raise ConfigError("must lie between 0 and 1", where="scheme.share", found=share)
        if not temperature > 0:
            raise ConfigError("must be above zero", where="scheme.temperature", found=temperature)
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
        first, second = self._split(config)
        terms = [] if loss is None else list(Terms.of(loss).items())
        hints = [o for _, o, _ in terms if isinstance(o, FitNets)] or [FitNets(self.tap, self.teacher_tap)]
        hint = hints[0] if len(hints) == 1 else sum(hints[1:], Terms.of(hints[0]))
        others = [(n, o, w) for n, o, w in terms if not isinstance(o, FitNets)]
        rest = (
            Terms([o for _, o, _ in others], [w for _, _, w in others], [n for n, _, _ in others]) if others else None
        )
        if rest is None or not rest.teacher_taps:
            answers = TeacherDecay() * (1 / self.temperature**2) * KD(self.temperature)
            rest = (rest if rest is not None else CrossEntropy()) + answers
        learn_to = hints[0].tap if len(hints) == 1 else None
        return [
            Stage("hint", Distiller(student, hint, teacher, logits=logits), first, learn_to=learn_to),
            Stage("distill", Distiller(student, rest, teacher, logits=logits), second),
        ]

    def _split(self, config: TrainConfig) -> tuple[TrainConfig, TrainConfig]:
        """The settings of both stages; lengths add up to the whole."""
        name = "steps" if config.steps is not None else "epochs"
        whole = getattr(config, name)
        if whole < 2:
            raise ConfigError(f"two stages need two {name} or more", where=f"train.{name}", found=whole)
        hint = min(max(round(whole * self.share), 1), whole - 1)
        return (
            config.model_copy(update={name: hint, "monitor": "total"}),
            config.model_copy(update={name: whole - hint}),
        )
