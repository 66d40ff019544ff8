"""Born-again networks: generations of one architecture, each taught by the one before it."""

from __future__ import annotations

from collections.abc import Iterator

from limbeck.core import catalogue
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Terms
from limbeck.core.teacher import FrozenTeacher
from limbeck.data.tasks import task_of
from limbeck.engine.stage import Stage
from limbeck.schemes.scheme import Cast, Scheme, Training, register


@register(
    Card(
        key="ban",
        name="Born-again networks",
        title="Born Again Neural Networks",
        year=2018,
        arxiv="1805.04770",
        knowledge="scheme",
        equation=r"\theta_k = \arg\min_\theta L(f_\theta, f_{\theta_{k-1}}), \quad k = 1 \dots K",
        use="To make a model better than itself: the same architecture again and again, from new random starts. With "
        "loss kd at temperature 1 (BAN), beside labels (BAN+L), cwtm or dkpp.",
        defaults={"generations": "the paper's gains come with the first two; it goes up to 3"},
        evidence="formula",
        evidence_note="no generation equals plain training; one equals distillation from a trained copy",
        choices=(
            "a teacher in the recipe is generation 0; without one that is trained on the labels first, and alike",
            "all generations train alike and for as long; the student is the last of them",
            "the ensemble of all generations is limbeck.teachers.Ensemble of the models in trainings/",
        ),
    )
)
class BornAgain(Scheme):
    r"""A chain of generations: the same architecture, a new start, the previous generation as teacher.

    .. math:: L_k = CE(z_k, y) + CE(p_{k-1}, q_k) \quad\text{(BAN+L)}, \qquad p, q \text{ at } T = 1

    Args:
        generations: K, after generation 0.

    Source: Born Again Neural Networks, arXiv 1805.04770.

    >>> from torch import nn
    >>> from limbeck.engine import TrainConfig
    >>> from limbeck.objectives import KD
    >>> cast = Cast(nn.Linear(4, 3), Terms.of(KD(1.0)), None, TrainConfig(), fresh=lambda number: nn.Linear(4, 3))
    >>> [training.name for training in BornAgain(2).trainings(cast)]
    ['generation-0', 'generation-1', '']
    """

    own_teacher = "may"

    def __init__(self, generations: int = 2) -> None:
        if generations < 1:
            raise ConfigError("there must be one at least", where="scheme.generations", found=generations)
        self.generations = generations

    def trainings(self, cast: Cast) -> Iterator[Training]:
        teacher = cast.teacher
        if teacher is None:
            first = cast.another(0)
            task = "classification" if cast.train is None else cast.train.task
            labels = Terms.of(catalogue.get(task_of(task).control).build())
            stage = Stage("labels", Distiller(first, labels, logits=cast.logits), cast.config)
            yield Training([stage], "generation-0")
            teacher = FrozenTeacher(first, logits=cast.logits)
        for number in range(1, self.generations):
            model = cast.another(number)
            distiller = Distiller(model, cast.again(), teacher, logits=cast.logits)
            yield Training([Stage("distill", distiller, cast.config)], f"generation-{number}")
            teacher = FrozenTeacher(model, logits=cast.logits)
        last = Distiller(cast.student, cast.loss, teacher, logits=cast.logits)
        yield Training([Stage("distill", last, cast.config)])
