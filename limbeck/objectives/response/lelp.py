"""LELP: linear directions of the teacher's feature split each class into subclasses, and KD teaches those."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.reduction import Reduction, check_floating, check_positive, reduce, widen
from limbeck.core.trace import Trace
from limbeck.objectives.parts.subspaces import class_directions, class_scores, features_by_class


def lelp_loss(
    subclass_logits: Tensor,
    teacher_logits: Tensor,
    scores: Tensor,
    *,
    temperature: float = 2.0,
    subclass_temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""KD over subclasses: the teacher's class probabilities, each shared out by where its feature lies in the class.

    .. math:: L = T^2\,\mathrm{KL}(t \,\|\, \mathrm{softmax}(u / T)), \qquad
        t_{c,j} = \mathrm{softmax}(z^T / T)_c \cdot \mathrm{softmax}\big([a_c, -a_c] / (\tau T)\big)_j

    Args:
        subclass_logits: :math:`u`, ``[B, *, C * 2S]``, class by class.
        teacher_logits: :math:`z^T`, ``[B, *, C]``; carries no gradient.
        scores: :math:`a`, ``[B, *, C, S]``: along each direction of each class, in standard deviations from its mean.
            Without directions (S = 0) each class is its only subclass, and this is KD.
        temperature: T.
        subclass_temperature: :math:`\tau`, beside T.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a position counts.
        reduction: ``"mean"`` over counted positions, ``"sum"`` or ``"none"``.

    Raises:
        TensorError: Shapes that do not belong together.
        ConfigError: A temperature not above zero.

    Source:
        Loo et al., "Linear Projections of Teacher Embeddings for Few-Class Distillation", 2024, arXiv 2409.20449.

    Example:
        >>> lelp_loss(torch.zeros(1, 4), torch.tensor([[9.0, -9.0]]), torch.zeros(1, 2, 1), temperature=1.0)
        tensor(0.6931)
    """
    for name, tensor in (("subclass_logits", subclass_logits), ("teacher_logits", teacher_logits), ("scores", scores)):
        check_floating(tensor, name, least=2)
    check_positive(temperature, "temperature")
    check_positive(subclass_temperature, "subclass_temperature")
    wanted = (*teacher_logits.shape[:-1], teacher_logits.shape[-1] * max(2 * scores.shape[-1], 1))
    if subclass_logits.shape != wanted or scores.shape[:-1] != teacher_logits.shape:
        found = f"{list(subclass_logits.shape)}, with teacher_logits {list(teacher_logits.shape)}"
        raise TensorError(
            "a logit for each subclass is wanted", where="subclass_logits", found=found, wanted=list(wanted)
        )
    apart = widen(scores.detach()) / (subclass_temperature * temperature)
    within = torch.cat([apart, -apart], dim=-1) if scores.shape[-1] else torch.zeros_like(teacher_logits).unsqueeze(-1)
    target = soften(teacher_logits.detach(), temperature).unsqueeze(-1) + within.log_softmax(dim=-1)
    values = kl_rows(target.flatten(-2), soften(subclass_logits, temperature))
    return temperature**2 * reduce(values, mask, reduction)


@register(
    Card(
        key="lelp",
        name="LELP",
        title="Linear Projections of Teacher Embeddings for Few-Class Distillation",
        year=2024,
        arxiv="2409.20449",
        knowledge="response",
        equation=r"T^2\,\mathrm{KL}(t\,\|\,\mathrm{softmax}(u/T)), \quad "
        r"t_{c,j} = \mathrm{softmax}(z^T/T)_c\,\mathrm{softmax}([a_c, -a_c]/(\tau T))_j",
        use="For two or few classes, where a prediction tells little: each class is split along the directions in "
        "which the teacher's feature varies within it. Any pair of architectures; instead of KD, beside the labels.",
        defaults={
            "subclasses": "10 of each class: five directions, two halves each; the paper's number is not known",
            "temperature": "2; the paper's is not known",
            "subclass_temperature": "1: scores are in standard deviations",
        },
        choices=(
            "Read from its abstract and summaries: null space of the classifier, principal components by class, "
            "subclasses. How scores become subclasses is our reading: each direction gives two, by the sign of the "
            "standardised score, softly.",
            "A sample counts to the class the teacher tells, so that no labels are needed for the directions.",
            "T softens the shares within a class as it softens the classes, and the student's subclasses are folded at "
            "it (the head has it too): who says what it was taught then has the teacher's class probabilities.",
            "Scores are standardised, which balances subclasses; no random rotation is drawn.",
            "Labels have the share they have beside KD, 0.1 to 0.9.",
            "At most 50,000 samples of a class are looked at.",
        ),
        needs=("answers",),
        with_labels={"cross_entropy": 0.1},
        weight=0.9,
        head="subclass",
    ),
    lelp_loss,
)
class LELP(Objective):
    """KD over subclasses told from the teacher's feature; see ``limbeck.functional.lelp_loss``.

    The student has the head ``subclass`` (``limbeck.models.put_head``), which recipes, comparisons and
    ``limbeck.distill`` put on by themselves; folded at the same temperature, it gives one logit a class.

    Args:
        subclasses: Of each class: an even number, or 1, which is KD. The head has as many.
        temperature: T, also of the head.
        subclass_temperature: Of the shares of a class; above 1 its subclasses are less apart.

    >>> loss = 0.9 * LELP(subclasses=4)
    """

    contract = Contract(normalizer="positions", at_equal=None, mask=True)
    student_taps = ("head.sub",)
    teacher_taps = ("logits", "penultimate", "logits@weight")
    directions: Tensor | None
    offsets: Tensor | None

    def __init__(self, subclasses: int = 10, temperature: float = 2.0, subclass_temperature: float = 1.0) -> None:
        super().__init__()
        if subclasses != 1 and (subclasses < 1 or subclasses % 2):
            raise ConfigError("must be even, or 1", where="subclasses", found=subclasses)
        check_positive(temperature, "temperature")
        check_positive(subclass_temperature, "subclass_temperature")
        self.subclasses, self.temperature, self.subclass_temperature = subclasses, temperature, subclass_temperature
        self.register_buffer("directions", None)
        self.register_buffer("offsets", None)

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        weight = teacher["logits@weight"]
        features, classes = features_by_class(data, len(weight), "lelp")
        self.directions, self.offsets = class_directions(features, classes, weight, self.subclasses // 2)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        scores = class_scores(teacher["penultimate"].detach(), self.ready("directions"), self.ready("offsets"))
        return lelp_loss(
            student["head.sub"],
            teacher.logits,
            scores,
            temperature=self.temperature,
            subclass_temperature=self.subclass_temperature,
            mask=batch.mask,
        )
