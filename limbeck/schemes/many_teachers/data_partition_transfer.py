"""Transfer between any two trained models: each sample is taught by who knows it better, the teacher or the student."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Terms
from limbeck.core.reduction import check_inside
from limbeck.core.teacher import FrozenTeacher, Teacher
from limbeck.engine.stage import Stage
from limbeck.objectives.response.cross_entropy import CrossEntropy
from limbeck.schemes.scheme import Cast, Scheme, Training, register
from limbeck.teachers.partitioned import PartitionedTeachers


@register(
    Card(
        key="data_partition_transfer",
        name="KL-Dist + DP",
        title="Fantastic Gains and Where to Find Them: On the Existence and Prospect of General Knowledge Transfer "
        "between Any Pretrained Model",
        year=2023,
        arxiv="2310.17653",
        code="ExplainableML/FantasticGains",
        knowledge="scheme",
        equation=r"L = T^2 KL(p_{k_i} \| p_s), \qquad k_i = \arg\max_{k \in \{0, t_1, \dots\}} p_k(y_i | x_i), "
        r"\qquad p_0 = \text{the student as it was}",
        use="For a student that is trained already, to take what another model knows better, stronger or weaker, and "
        "lose nothing. The paper's loss is kd alone at temperature 1, at a rate of 1e-4.",
        defaults={
            "supervised": "true; without labels it does nearly as well in the paper",
            "one_by_one": "false: all teachers at once, as in the authors' code",
            "pretrain": "0: the student comes trained, as the paper's do",
        },
        evidence="formula",
        evidence_note="choice, target, loss and gradients against plain loops over samples",
        choices=(
            "teachers that are as sure as the student as it was do not count, as in the authors' code",
            "of one by one they are in the order of the recipe; the student as it was is that of each one's beginning",
            "its baselines are other recipes: kd alone, cross_entropy beside kd, and train.ema for slow weights",
            "a sample without a label is taught by the student as it was",
        ),
    )
)
class DataPartitionTransfer(Scheme):
    r"""One training in which a frozen copy of the student stands beside its teachers.

    .. math:: L = L_{\text{loss}}(z^*, z_s), \qquad z^*_i = z_{k_i, i}, \qquad k_i = \arg\max_k p_k(y_i | x_i)

    Where the copy is the surest the student is held where it was; elsewhere it learns. Without labels the surest is who
    gives its first class most.

    Args:
        supervised: Choose by the label.
        one_by_one: Learn from one teacher after another, each in a training of its own.
        pretrain: Train the student on labels first, for this part of the recipe's length; 0: it is trained already.

    Source: Fantastic Gains and Where to Find Them, arXiv 2310.17653.

    >>> from torch import nn
    >>> from limbeck.engine import TrainConfig
    >>> from limbeck.objectives import KD
    >>> cast = Cast(nn.Linear(4, 3), Terms.of(KD(1.0)), FrozenTeacher(nn.Linear(4, 3)), TrainConfig())
    >>> (training,) = DataPartitionTransfer().trainings(cast)
    >>> len(training.stages[0].distiller.teacher.members)
    2
    """

    def __init__(self, supervised: bool = True, one_by_one: bool = False, pretrain: float = 0.0) -> None:
        check_inside(pretrain, "scheme.pretrain", closed=True)
        self.supervised, self.one_by_one, self.pretrain = supervised, one_by_one, pretrain

    def trainings(self, cast: Cast) -> Iterator[Training]:
        others = [name for name, objective, _ in cast.loss.items() if set(objective.teacher_taps) - {"logits"}]
        if others or not cast.loss.teacher_taps:
            raise ConfigError(
                "a sample's teacher is chosen by its logits, and they are what is learned",
                where=f"loss.{others[0]}" if others else "loss",
                found=", ".join(cast.loss.names),
                remedy="write loss: {kd: {temperature: 1}}",
            )
        given = cast.teachers or {"teacher": cast.need_teacher("knowledge is transferred from")}
        if self.pretrain:
            name = "steps" if cast.config.steps is not None else "epochs"
            length = max(1, round(getattr(cast.config, name) * self.pretrain))
            alone = Distiller(cast.student, Terms.of(CrossEntropy()), logits=cast.logits)
            yield Training([Stage("before", alone, cast.config.model_copy(update={name: length}))], "before")
        groups = [[teacher] for teacher in given.values()] if self.one_by_one else [list(given.values())]
        for number, group in enumerate(groups, 1):
            last = number == len(groups)
            distiller = self._between(cast, group, cast.loss if last else cast.again())
            yield Training([Stage("transfer", distiller, cast.config)], "" if last else f"transfer-{number}")

    def _between(self, cast: Cast, teachers: list[Teacher], loss: Terms) -> Distiller:
        before = FrozenTeacher(copy.deepcopy(cast.student), logits=cast.logits)
        kind = Transfer if self.supervised else Unsupervised
        return kind(
            cast.student,
            loss,
            PartitionedTeachers([before, *teachers], supervised=self.supervised),
            logits=cast.logits,
        )


class Transfer(Distiller):
    """A student of teachers that share the samples among them; how is part of what the run is."""

    def settled(self) -> dict[str, Any]:
        assert isinstance(self.teacher, PartitionedTeachers)
        return {"supervised": self.teacher.supervised}


class Unsupervised(Transfer):
    """The same, by which no label is seen unless some term of the loss asks for it."""

    def made(self, batch: Batch) -> Batch:
        return batch if any(not o.teacher_taps for o in self.loss) else batch.replace(labels=None)
