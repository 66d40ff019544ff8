"""Knowledge concentration: specialists, each for some of the classes, are merged into one student of all."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.distiller import Distiller
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.objective import Contract, Objective, Terms
from limbeck.core.reduction import check_positive, check_same_shape, widen
from limbeck.core.schedules import Constant
from limbeck.core.trace import Trace
from limbeck.data.loader import IndexedLoader, Loader
from limbeck.engine.stage import Stage
from limbeck.models.concentration import Verticals, verticals_of
from limbeck.objectives.response.binary_cross_entropy import binary_cross_entropy_loss
from limbeck.schemes.parts.looking import indexed
from limbeck.schemes.scheme import Cast, Scheme, Training, register
from limbeck.teachers.verticals import VerticalTeachers


def concentration_loss(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Binary cross-entropy with a teacher's probabilities, summed over classes and averaged over samples.

    .. math:: L = -\sum_j z^*_j \log \sigma(x_j) + (1 - z^*_j) \log (1 - \sigma(x_j)), \qquad z^* = \sigma(z^T)

    Args:
        student_logits: ``[B, N]``.
        teacher_logits: ``[B, N]``; detached. Of what is never so, they are far below 0.
        mask: ``[B]``, who counts.

    >>> concentration_loss(torch.zeros(1, 2), torch.tensor([[0.0, -1e4]]))
    tensor(1.3863)
    """
    check_same_shape(student_logits, teacher_logits, "student_logits", "teacher_logits")
    return binary_cross_entropy_loss(student_logits, widen(teacher_logits.detach()).sigmoid(), mask=mask)


@register(
    Card(
        key="knowledge_concentration",
        name="Knowledge Concentration",
        title="Knowledge Concentration: Learning 100K Object Classifiers in a Single CNN",
        year=2017,
        arxiv="1711.07607",
        knowledge="scheme",
        equation=r"L = -\sum_j z^*_j \log \sigma(x_j) + (1 - z^*_j) \log (1 - \sigma(x_j)), \qquad z^*_j = "
        r"\sigma(z^{T(y)}_j) \text{ among its top K, else } 0",
        use="For many classes that fall into verticals (cars, birds, ...), each with a specialist. The student may be "
        "`limbeck.models.concentration:concentrated`, whose verticals have layers and a pace of their own.",
        defaults={
            "most": "100, the paper's",
            "labels": "0: the paper has no term on hard labels",
        },
        evidence="reading",
        choices=(
            "The equations are from a detailed summary of the paper and its abstract. The layers' rectifiers are ours.",
            "Without teachers in the recipe the specialists are trained first, on the samples of their verticals, by "
            "binary cross-entropy over their classes: copies of the player `specialist`, or models like the student.",
            "A sample of labels in several verticals is taught by the specialist of each.",
            "The layers and the pace belong to the student and ship with it: they are a model, apart from the loss.",
        ),
        needs=("labels",),
        tasks=("classification", "multilabel", "several teachers"),
        cost="Specialists, where the recipe has none, are trained as long as the student, each on its samples.",
    )
)
class KnowledgeConcentration(Scheme):
    """Each sample is taught by the specialist of its label's vertical; classes of all others are taught to be none.

    Args:
        verticals: The classes of each specialist, in the teachers' order: numbers of classes that follow each other, or
            lists of them; ``None``: all there are, in order and as evenly as can be.
        most: How many classes of an answer count; the others have 0.
        labels: Weight of the recipe's own loss beside.

    Source: Knowledge Concentration, arXiv 1711.07607.

    >>> KnowledgeConcentration([6, 4]).verticals
    [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]]
    """

    def __init__(self, verticals: Verticals | None = None, most: int = 100, labels: float = 0.0) -> None:
        check_positive(most, "scheme.most")
        check_positive(1 + labels, "scheme.labels")
        self.verticals = None if verticals is None else verticals_of(verticals, "scheme.verticals")
        self.most, self.labels = most, labels

    def trainings(self, cast: Cast) -> Iterator[Training]:
        members = list(cast.teachers.values())
        verticals = self.verticals or _evenly(cast.train, len(members))
        if not members:
            train = indexed(cast.train, "knowledge_concentration")
            for number, classes in enumerate(verticals):
                known = "specialist" in cast.players
                model = copy.deepcopy(cast.player("specialist")) if known else cast.another(number + 1)
                own = Distiller(model, VerticalLabels(classes), logits=None if known else cast.logits)
                config = cast.config.model_copy(update={"monitor": "total", "patience": None})
                rows = samples_of(train, classes)
                yield Training(
                    [Stage("specialist", own, config)], f"specialist_{number}", train.chosen(rows), judged=False
                )
                members.append(model)  # type: ignore[arg-type]
        teacher = VerticalTeachers(members, verticals, self.most)
        loss = Terms([SpecialistAnswers()], [Constant(1.0)], ["specialists"])
        if self.labels:
            loss = loss + self.labels * cast.loss
        yield Training(
            [Stage("concentration", Distiller(cast.student, loss, teacher, logits=cast.logits), cast.config)]
        )


class SpecialistAnswers(Objective):
    """See :func:`concentration_loss`."""

    contract = Contract(normalizer="labels", at_equal=None)
    student_taps = teacher_taps = ("logits",)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        labels = batch.require("labels")
        mask = None if labels.is_floating_point() else labels >= 0
        return concentration_loss(student.logits, teacher.logits, mask)


class VerticalLabels(Objective):
    """What a specialist learns: binary cross-entropy over its own classes, of logits of these or of all.

    Args:
        classes: Its own.
    """

    contract = Contract(normalizer="labels", at_equal=None)
    student_taps = ("logits",)
    places: Tensor

    def __init__(self, classes: list[int]) -> None:
        super().__init__()
        self.register_buffer("places", torch.tensor(classes), persistent=False)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        logits, labels = student.logits, batch.require("labels")
        if logits.shape[1] != len(self.places):
            logits = logits[:, self.places]
        if labels.is_floating_point():
            return binary_cross_entropy_loss(logits, labels[:, self.places])
        target = (labels.unsqueeze(1) == self.places).to(logits.dtype)
        return binary_cross_entropy_loss(logits, target, mask=labels >= 0)


def _evenly(train: Loader | None, count: int) -> list[list[int]]:
    """The classes of so many specialists.

    Raises:
        ConfigError: There are no specialists to share them, or fewer classes than these.
    """
    classes = None if train is None else train.classes
    if not count or classes is None or classes < count:
        raise ConfigError(
            "which classes belong together is not said",
            where="scheme.verticals",
            found=f"{count} teachers, {classes} classes",
            remedy="give their numbers, such as verticals: [6, 4]",
        )
    return [part.tolist() for part in torch.arange(classes).tensor_split(count)]


def samples_of(train: IndexedLoader, classes: list[int]) -> Tensor:
    """Ids of the samples with a label among these classes.

    Raises:
        DataError: There are none, or labels are not known as a whole.
    """
    labels = train.labels
    if labels is None:
        raise DataError("which sample is of which vertical is not known", where="data.labels", found="none")
    own = torch.tensor(classes)
    found = (labels[:, own] > 0.5).any(dim=1) if labels.is_floating_point() else torch.isin(labels.cpu(), own)
    rows = found.cpu().nonzero().flatten()
    if train.only is not None:
        rows = rows[torch.isin(rows, train.only)]
    if not len(rows):
        raise DataError("a vertical has no samples", where="scheme.verticals", found=classes[:5])
    return rows
