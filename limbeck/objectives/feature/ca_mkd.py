"""CA-MKD: of several teachers, sample by sample, those count more that are nearer to the label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.ensembling import confidence_weights, stacked
from limbeck.core.errors import TensorError
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import Reduction, check_inside, check_logits, check_positive, reduce
from limbeck.core.trace import Trace
from limbeck.objectives.parts.many_teachers import TeacherConnectors, distances


@without_autocast
def ca_mkd_loss(
    student_logits: Tensor,
    teacher_logits: Sequence[Tensor],
    labels: Tensor,
    *,
    student_features: Sequence[Tensor] = (),
    teacher_features: Sequence[Tensor] = (),
    feature_logits: Sequence[Tensor] = (),
    alpha: float = 1.0,
    beta: float = 50.0,
    temperature: float = 4.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergences from several teachers, and distances from their features, weighted sample by sample.

    .. math:: L = \alpha\, T^2 \sum_k w_k\, \mathrm{KL}(p_k^T \| p_S^T) + \beta \sum_k v_k\, \frac{1}{|F_k|}
        \left\| F_k - r_k(F_S) \right\|_2^2, \qquad
        w_k = \frac{1}{K - 1} \Big( 1 - \frac{e^{H_k}}{\sum_j e^{H_j}} \Big)

    :math:`H_k` is the teacher's cross-entropy, :math:`v_k` that of what its classifier makes of the student's feature.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: One ``[B, *, C]`` for each teacher; detached.
        labels: ``[B, *]`` integers (negative: there all teachers count alike), or ``[B, *, C]`` shares of one.
        student_features: For each teacher, the student's feature as its connector gives it; none: logits alone.
        teacher_features: The teachers', each of that shape, ``[B, *, ...]``; detached.
        feature_logits: What each teacher's classifier makes of the student's feature, ``[B, *, C]``.
        alpha, beta: Weights of the divergences and of the features.
        temperature: T.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count, ``"sum"``, or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes that do not fit, or not one feature for each teacher.

    Source: Confidence-Aware Multi-Teacher Knowledge Distillation, arXiv 2201.00007.

    >>> import torch
    >>> student, right, wrong = torch.zeros(1, 2), torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    >>> options = {"labels": torch.tensor([0]), "temperature": 1.0}
    >>> ca_mkd_loss(student, [right, right], **options), ca_mkd_loss(student, [right, wrong], **options)
    (tensor(0.6031), tensor(0.6031))
    """
    teachers = stacked(teacher_logits).detach()
    check_logits(student_logits, teacher_logits[0])
    check_positive(temperature, "temperature")
    log_q = soften(student_logits, temperature)
    apart = kl_rows(soften(teachers, temperature), log_q.expand_as(teachers))
    values = alpha * temperature**2 * (confidence_weights(teachers, labels) * apart).sum(dim=0)
    if student_features:
        far = distances(student_features, teacher_features, log_q.ndim - 1)
        if not len(far) == len(feature_logits) == len(teachers):
            found = [len(far), len(feature_logits), len(teachers)]
            raise TensorError("not as many features and logits as teachers", where="student_features", found=found)
        values = values + beta * (confidence_weights(stacked(feature_logits), labels) * far).sum(dim=0)
    return reduce(values, mask, reduction)


@register(
    Card(
        key="ca_mkd",
        name="CA-MKD",
        title="Confidence-Aware Multi-Teacher Knowledge Distillation",
        year=2021,
        arxiv="2201.00007",
        code="Rorozhl/CA-MKD",
        knowledge="feature",
        equation=r"\alpha T^2 \sum_k w_k \mathrm{KL}(p_k \| p_S) + \beta \sum_k v_k \overline{(F_k - r_k(F_S))^2}",
        use="Several teachers of one task, each wrong on some samples: labels tell whom to trust on which.",
        defaults={
            "alpha": "1, the authors'; beta 50, temperature 4",
            "tap": "the last map before pooling, the authors'",
        },
        evidence="parity",
        evidence_note="value and gradients of Rorozhl/CA-MKD@c2f39a9",
        choices=(
            "Weights sum to one over teachers, as in the paper; the code divides by their number once more, so that "
            "its alpha 1 and beta 50 are 1/K and 50/K here.",
            "The connector is the code's, without ReLU where the teacher's feature can be negative.",
            "Each connector reads the student's own map; the code resizes what it had resized for the teacher before.",
            "Features' weights pass a gradient, as in the code, and count from the start, there from the second epoch.",
        ),
        needs=("labels",),
        tasks=("several teachers",),
        with_labels={"cross_entropy": 1.0},
        cost="Every teacher answers each batch.",
    ),
    ca_mkd_loss,
)
class CAMKD(Objective):
    """Confidence-aware distillation from several teachers; see ``limbeck.functional.ca_mkd_loss``.

    Args:
        alpha, temperature: As there.
        beta: Weight of the features; 0 compares logits alone.
        tap: Which features.

    >>> CAMKD(beta=0.0).student_taps
    ('logits',)
    """

    contract = Contract(normalizer="positions", at_equal=None, decomposes=False, least_samples=2)

    def __init__(
        self, alpha: float = 1.0, beta: float = 50.0, temperature: float = 4.0, tap: str = "stages:-1"
    ) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        check_inside(alpha, "alpha", 0.0, float("inf"), closed=True)
        check_inside(beta, "beta", 0.0, float("inf"), closed=True)
        self.options: dict[str, Any] = {"alpha": alpha, "beta": beta, "temperature": temperature}
        self.beta, self.tap = beta, tap
        self.student_taps = ("logits", tap) if beta else ("logits",)
        self.teacher_taps = (*self.student_taps, "logits@weight", "logits@bias") if beta else ("logits",)
        self.connectors: TeacherConnectors | None = None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        if self.beta:
            self.connectors = TeacherConnectors(student, teacher.members or (teacher,), self.tap)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        members = teacher.members or (teacher,)
        features: dict[str, Any] = self.ready("connectors")(student, members) if self.beta else {}
        labels, said = batch.require("labels"), [member.logits for member in members]
        return ca_mkd_loss(student.logits, said, labels, mask=batch.mask, **self.options, **features)
