"""ProKD: a teacher whose classes lie alike in two languages, and a student that asks where classes lie in its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card
from limbeck.core.errors import ConfigError, DataError
from limbeck.core.objective import Contract, Objective, Terms
from limbeck.core.reduction import check_inside, check_positive
from limbeck.core.teacher import FrozenTeacher
from limbeck.core.trace import Trace
from limbeck.data.loader import IndexedLoader, Loader
from limbeck.engine.stage import Stage
from limbeck.objectives.response.prob_mse import prob_mse_loss
from limbeck.schemes.language.prototypical import IGNORED, AlignedTeacher, SelfTrainer, Settings
from limbeck.schemes.parts.looking import whole_batches
from limbeck.schemes.parts.sides import weigh_sides
from limbeck.schemes.scheme import Cast, Scheme, Training, register


@register(
    Card(
        key="prokd",
        name="ProKD",
        title="ProKD: An Unsupervised Prototypical Knowledge Distillation Network for Zero-Resource Cross-Lingual "
        "Named Entity Recognition",
        year=2023,
        arxiv="2301.08855",
        knowledge="scheme",
        equation=r"L_T = \mathrm{CE} + w_{pa} L_{pa}(c^S, c^T), \quad L_S = \| p^T - p^S \|^2 + w_{st} "
        r"\mathrm{CE}(p^S, \hat y), \quad \hat y = \arg\max_k\, \mathrm{softmax}_k(-\| h - c_k \|^2 / \tau)\, p^T_k",
        use="For labels of tokens in one language and texts without labels in another: named entities across "
        "languages, with a multilingual encoder for both models. Works for any classes of two domains, one unlabelled.",
        defaults={
            "align, self_train": "1 each, our choice",
            "momentum": "0.95, our choice",
            "temperature": "0.1 for both, our choice",
            "warmup": "the first tenth of either training, our choice",
        },
        evidence="reading",
        choices=(
            "of the paper the abstract and introduction could be read: prototypes of classes are aligned between "
            "languages by contrast, and the student is trained on labels told by distances; formulas are ours",
            "features are what enters the last linear layer, features and prototypes are scaled to length 1",
            "with a loss that asks a teacher, such as kd, that is how the student learns; else the squared distance of "
            "probabilities",
            "prototypes of the student are those of its own features, by labels that distances have set right; a class "
            "not seen before takes the teacher's word",
            "the class of words that are no entity has a prototype like any other",
            "a copy of the recipe's teacher is trained, which itself stays as it was",
        ),
        tasks=("text classification", "token classification"),
        cost="The teacher is trained as well, before the student and for as long.",
    )
)
class ProKD(Scheme):
    r"""Two trainings: the teacher from labelled and unlabelled samples, then the student from the unlabelled ones.

    .. math:: L_T = \mathrm{CE} + w_{pa} L_{pa}, \qquad L_S = \| p^T - p^S \|^2 + w_{st}\, \mathrm{CE}(p^S, \hat y)

    A sample of which no place has a label (all are negative) is of the target language; places labelled -100 count in
    no language. :math:`L_{pa}` draws prototypes of one class together and others apart, of labels in the source and of
    the teacher's own guesses in the target (:func:`~limbeck.objectives.parts.class_prototypes.alignment`). Pseudo
    labels :math:`\hat y` are the likeliest by both the teacher and the distance from the student's prototypes.

    Args:
        tap: Where features are.
        align: :math:`w_{pa}`.
        self_train: :math:`w_{st}`.
        momentum: Of prototypes.
        temperature: Of the alignment.
        distance_temperature: :math:`\tau`, of distances.
        warmup: The share of either training before alignment or self-training begins.
        confidence: A guess counts in the teacher's prototypes by its probability.

    Source: ProKD, arXiv 2301.08855.

    >>> ProKD(align=0.5).settings.momentum
    0.95
    """

    def __init__(
        self,
        tap: str = "penultimate",
        align: float = 1.0,
        self_train: float = 1.0,
        momentum: float = 0.95,
        temperature: float = 0.1,
        distance_temperature: float = 0.1,
        warmup: float = 0.1,
        confidence: bool = False,
    ) -> None:
        for name, value in (("align", align), ("self_train", self_train)):
            if value < 0:
                raise ConfigError("must not be negative", where=f"scheme.{name}", found=value)
        check_inside(momentum, "scheme.momentum", closed=True)
        check_inside(warmup, "scheme.warmup", closed=True)
        check_positive(temperature, "scheme.temperature")
        check_positive(distance_temperature, "scheme.distance_temperature")
        self.settings = Settings(
            tap, align, self_train, momentum, temperature, distance_temperature, warmup, confidence
        )

    def trainings(self, cast: Cast) -> Iterator[Training]:
        given = cast.need_teacher("labels of the source language are learned by")
        if not isinstance(given, FrozenTeacher):
            raise ConfigError(
                "the teacher learns here, which takes a model at hand",
                where="teacher",
                found=type(given).__name__,
                remedy="give the model itself, not a cache of what it said",
            )
        whole_batches(cast.config.accumulate, "prokd", "compares classes over a whole batch")
        train, rows = _unlabelled(cast.train)
        model = copy.deepcopy(given.model).requires_grad_(True)
        labels = weigh_sides(cast.again(), 1.0, 0.0, "the teacher")
        first = AlignedTeacher(model, labels, None, self.settings, logits=given.where)
        yield Training([Stage("prokd_teacher", first, cast.config)], "teacher")
        loss = cast.loss
        loss = weigh_sides(loss, 0.0, 1.0, "the student") if loss.teacher_taps else Terms.of(ProbabilityDistance())
        teacher = FrozenTeacher(model, logits=given.where)
        second = SelfTrainer(cast.student, loss, teacher, self.settings, logits=cast.logits)
        yield Training([Stage("prokd", second, cast.config)], train=train.chosen(rows))


class ProbabilityDistance(Objective):
    r"""The mean over places that count of :math:`\| p^T - p^S \|^2`.

    >>> said = [Trace(None, {"logits": torch.tensor([[z, 0.0]])}) for z in (0.0, 9e9)]
    >>> ProbabilityDistance()(*said, Batch(torch.zeros(1, 2)))
    tensor(0.5000)
    """

    contract = Contract(normalizer="positions", mask=True)
    student_taps = teacher_taps = ("logits",)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        classes = student.logits.shape[-1]
        return classes * prob_mse_loss(student.logits, teacher.logits, mask=batch.mask)


def _unlabelled(train: Loader | None) -> tuple[IndexedLoader, Tensor]:
    """The loader, and the ids of its samples of the target language.

    Raises:
        DataError: There are none, or no others, or their labels are not known as a whole.
    """
    labels = None if train is None else train.labels
    if not isinstance(train, IndexedLoader) or labels is None or labels.is_floating_point():
        raise DataError(
            "which samples have no label has to be known before training",
            where="scheme prokd",
            found="no integer labels of the whole set",
            wanted="tensors or a data set with labels, negative where there is none",
        )
    labels = labels.cpu().flatten(1) if labels.ndim > 1 else labels.cpu().unsqueeze(1)
    none = (labels < 0).all(dim=1)
    words = none & (labels != IGNORED).any(dim=1)
    if bool(none.all()) or not bool(words.any()):
        found = f"{int(none.sum())} of {len(none)} samples without labels, {int(words.sum())} of them with a word"
        wanted = "samples with labels (the source) and samples without (the target: -1 at every word, -100 elsewhere)"
        raise DataError("two languages are learned from", where="scheme prokd", found=found, wanted=wanted)
    rows = words.nonzero().flatten()
    return train, rows if train.only is None else rows[torch.isin(rows, train.only)]
