"""Relational knowledge distillation (RKD): distances and angles between the samples of a batch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.objective import Contract, Objective
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import Reduction, reduce
from limbeck.core.relations import gram, paired_rows, scaled_distances, unit
from limbeck.core.trace import Trace


@without_autocast
def rkd_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Huber distance between the student's and the teacher's pairwise distances and angles.

    .. math::
        L &= \lambda_D \frac 1 {N^2} \sum_{ij} h\left( \psi^S_{ij} - \psi^T_{ij} \right)
            + \lambda_A \frac 1 {N^3} \sum_{ijk} h\left( \cos^S_{ijk} - \cos^T_{ijk} \right) \\
        \psi_{ij} &= \frac{\|x_i - x_j\|_2}{\mu}, \qquad
        \cos_{ijk} = \left\langle \frac{x_i - x_j}{\|x_i - x_j\|_2}, \frac{x_k - x_j}{\|x_k - x_j\|_2} \right\rangle

    :math:`\mu` is the mean of the distances above zero, taken for student and teacher apart, so scale does not matter
    and the two may differ in width. :math:`h` is the Huber loss with delta 1. As in the authors' code, sums run over
    all pairs and triples, also those that name a sample twice. Distances are taken from differences rather than from a
    Gram matrix, which would lose the digits of near neighbours in float32; equal samples pass no gradient.

    The loss ties the samples of a batch together: the loss of a batch is not the mean of the losses of its parts. One
    sample has no relation: 0. Memory grows with :math:`N^2 D + N^3`.

    Args:
        student_feature: ``[B, *]``; flattened to one vector a sample.
        teacher_feature: ``[B, *]``, of any width; detached.
        distance_weight: :math:`\lambda_D`; 25 for classification (1 for metric learning in the authors' scripts).
        angle_weight: :math:`\lambda_A`; 50 for classification (2 for metric learning).
        mask: Booleans ``[B]``, True where a sample counts; or over the first dimensions of both features (tokens),
            where a place left out is 0 in both.
        reduction: ``"mean"``; ``"sum"``, the mean times the count; ``"none"``: ``[B]``, the part of each sample as
            first of a pair and as corner of the angles.

    Raises:
        TensorError: Features of different batch sizes, or a mask that does not fit.

    Source: Park et al., "Relational Knowledge Distillation", 2019, arXiv 1904.05068, equations 3 to 8.

    >>> import torch
    >>> teacher = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> rkd_loss(student, teacher, distance_weight=1.0, angle_weight=0.0)
    tensor(0.0035)
    """
    student, teacher, counts = paired_rows(student_feature, teacher_feature, mask)
    weight = student.new_ones(len(student)) if counts is None else counts.to(student.dtype)
    number = weight.sum().clamp(min=1)

    values = student.new_zeros(len(student))
    if distance_weight:
        gap = F.smooth_l1_loss(scaled_distances(student, weight), scaled_distances(teacher, weight), reduction="none")
        values = values + distance_weight * (gap @ weight) / number
    if angle_weight:
        gap = F.smooth_l1_loss(_angles(student), _angles(teacher), reduction="none")
        values = values + angle_weight * (gap @ weight @ weight) / number**2
    return reduce(values, counts, reduction)


def _angles(x: Tensor) -> Tensor:
    """``[N, N, N]``: cosine at the first index between the ways to the second and the third."""
    return gram(unit(x.unsqueeze(0) - x.unsqueeze(1)))


@register(
    Card(
        key="rkd",
        name="RKD",
        title="Relational Knowledge Distillation",
        year=2019,
        arxiv="1904.05068",
        code="lenscloth/RKD",
        knowledge="relation",
        equation=r"\lambda_D \frac 1 {N^2} \sum_{ij} h(\psi^S_{ij} - \psi^T_{ij}) "
        r"+ \lambda_A \frac 1 {N^3} \sum_{ijk} h(\cos^S_{ijk} - \cos^T_{ijk})",
        use="For embeddings and metric learning, where distances matter and coordinates do not: widths may differ and "
        "nothing is learned beside the student. Memory grows with the cube of the batch.",
        defaults={
            "distance_weight": "25, for classification; 1 in the authors' scripts for metric learning",
            "angle_weight": "50, for classification; 2 in the authors' scripts for metric learning",
            "tap": "what enters the classifier, as in RepDistiller",
        },
        evidence="parity",
        evidence_note="value and gradient of HobbitLong/RepDistiller@b84f547 and megvii-research/mdistiller@a08d46f, "
        "whose function is the authors' own",
        choices=(
            "Means over all pairs and triples, as in the authors' code; the paper writes sums.",
            "Equal samples have distance 0 and no direction, without the code's epsilons, which would pass gradients "
            "of 1e12.",
        ),
        tasks=("classification", "embedding"),
        with_labels={"cross_entropy": 1.0},
    ),
    rkd_loss,
)
class RKD(Objective):
    """Relational knowledge distillation; see ``limbeck.functional.rkd_loss``.

    Args:
        tap: The embedding to compare.
        teacher_tap: The teacher's, where it is called otherwise.
        distance_weight: Of the distances.
        angle_weight: Of the angles.

    >>> loss = RKD(distance_weight=1.0, angle_weight=2.0)
    """

    contract = Contract(normalizer="samples", mask=True, decomposes=False)

    def __init__(
        self,
        tap: str = "penultimate",
        teacher_tap: str | None = None,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
    ) -> None:
        super().__init__()
        self.tap, self.teacher_tap = tap, teacher_tap or tap
        self.student_taps, self.teacher_taps = (self.tap,), (self.teacher_tap,)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        s, t, weights = student[self.tap], teacher[self.teacher_tap], (self.distance_weight, self.angle_weight)
        return rkd_loss(s, t, distance_weight=weights[0], angle_weight=weights[1], mask=batch.mask)
