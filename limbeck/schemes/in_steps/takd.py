"""Teacher assistants: knowledge goes down a chain of ever smaller models."""

from __future__ import annotations

from collections.abc import Iterator

from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller
from limbeck.core.teacher import FrozenTeacher, Teacher
from limbeck.engine.stage import Stage
from limbeck.schemes.scheme import Cast, Scheme, Training, register


@register(
    Card(
        key="takd",
        name="TAKD",
        title="Improved Knowledge Distillation via Teacher Assistant",
        year=2019,
        arxiv="1902.03393",
        code="imirzadeh/Teacher-Assistant-Knowledge-Distillation",
        knowledge="scheme",
        equation=r"M_0 \to M_1 \to \dots \to M_n: \quad \theta_k = \arg\min_\theta L(M_\theta, M_{k-1})",
        use="Where the teacher is far larger than the student: put models of sizes between them in the path. Works "
        "with any loss; every hop costs a training.",
        defaults={"path": "one assistant, the paper's usual case"},
        evidence="formula",
        evidence_note="an empty path equals plain distillation bit for bit; each hop equals a run of its own",
        choices=(
            "every hop trains as the recipe says, for as long; the paper keeps each hop's best validation weights, "
            "which train.select: best does",
            "the released script divides the divergence by the number of classes too; here the loss is the recipe's",
        ),
    )
)
class TAKD(Scheme):
    r"""A chain of trainings: each model learns from the one before it, the student from the last assistant.

    .. math:: L_k = (1 - \lambda)\, CE(z_k, y) + \lambda T^2 KL(p_{k-1} \| p_k), \qquad M_0 = \text{teacher}

    The loss is the recipe's, whatever it is; each hop has it anew, since helpers are sized for one pair of models.

    Args:
        path: Names of players, from the largest to the smallest.

    Source: Improved Knowledge Distillation via Teacher Assistant, arXiv 1902.03393.

    >>> from torch import nn
    >>> from limbeck.core.objective import Terms
    >>> from limbeck.engine import TrainConfig
    >>> from limbeck.objectives import KD
    >>> teacher, assistant, student = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 3)
    >>> cast = Cast(student, Terms.of(KD()), FrozenTeacher(teacher), TrainConfig(), players={"assistant": assistant})
    >>> [training.name for training in TAKD().trainings(cast)]
    ['assistant', '']
    """

    def __init__(self, path: list[str] = ["assistant"]) -> None:  # noqa: B006  never changed
        self.path = list(path)

    def trainings(self, cast: Cast) -> Iterator[Training]:
        teacher: Teacher = cast.need_teacher("a chain of assistants begins with")
        for name in self.path:
            assistant = cast.player(name)
            yield Training([Stage("distill", Distiller(assistant, cast.again(), teacher), cast.config)], name)
            teacher = FrozenTeacher(assistant)
        last = Distiller(cast.student, cast.loss, teacher, logits=cast.logits)
        yield Training([Stage("distill", last, cast.config)])
