"""Projector ensemble feature distillation (PEFD): the mean of several projections points where the teacher points."""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.layers import LayerObjective
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.projectors import LinearProjector
from limbeck.core.reduction import Reduction, check_features, check_positive, reduce, widen
from limbeck.core.relations import channel_dim, check_same_batch, pooled, unit
from limbeck.core.trace import Trace


def pefd_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""One minus the cosine between the mean of the student's projections and the teacher's feature.

    .. math:: L = 1 - \frac{\langle f, t \rangle}{\|f\|_2 \|t\|_2}, \qquad f = \frac 1 K \sum_{k=1}^K g_k(s)

    Only the direction counts. A vector of length 0 has cosine 0 with everything.

    Args:
        student_feature: :math:`f`, ``[B, *, D]``.
        teacher_feature: :math:`t`, the same shape; detached.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a row counts.
        reduction: ``"mean"`` over rows that count, ``"sum"``, or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Features of different shapes.

    Source:
        Chen et al., "Improved Feature Distillation via Projector Ensemble", 2022, arXiv 2210.15274.

    Example:
        >>> import torch
        >>> pefd_loss(torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0, 0.0]]))
        tensor(0.4000)
    """
    check_features(student_feature, teacher_feature)
    student, teacher = widen(student_feature), widen(teacher_feature.detach())
    return reduce(1 - (unit(student) * unit(teacher)).sum(dim=-1), mask, reduction)


@register(
    Card(
        key="pefd",
        name="PEFD",
        title="Improved Feature Distillation via Projector Ensemble",
        year=2022,
        arxiv="2210.15274",
        code="chenyd7/PEFD",
        knowledge="feature",
        equation=r"1 - \cos\left( \frac 1 K \sum_{k=1}^K g_k(s), t \right)",
        use="On what enters the classifier, between any networks: a projector, even between equal widths, keeps "
        "the student's feature free for its own classes, and several of them transfer better than one.",
        defaults={
            "number": "3, as in the paper",
            "tap": "what enters the classifier, as in the paper",
        },
        evidence="parity",
        evidence_note="value and gradients of the loss and of its three projectors, of chenyd7/PEFD@7f1e2de",
        choices=(
            "Where the teacher's feature can be negative (transformers), which the paper does not consider, the "
            "projectors end without their ReLU.",
        ),
        with_labels={"cross_entropy": 1.0},
        weight=25.0,
    ),
    pefd_loss,
)
class PEFD(LayerObjective):
    """Distillation through an ensemble of projectors; see ``limbeck.functional.pefd_loss``.

    Args:
        tap: The feature to project; the mean of its places that count.
        teacher_tap: The teacher's, where it is called otherwise.
        number: How many projectors, each started for itself.

    >>> loss = 25.0 * PEFD(number=4)
    """

    contract = Contract(at_equal=None, mask=True)
    projectors: nn.ModuleList | None

    def __init__(self, tap: str = "penultimate", teacher_tap: str | None = None, number: int = 3) -> None:
        super().__init__(tap, teacher_tap)
        check_positive(number, "number")
        self.number, self.relu, self.projectors = number, False, None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        s, t = self.pair(student, teacher)
        self.relu = bool((t >= 0).all())
        sizes = s.shape[channel_dim(s)], t.shape[channel_dim(t)]
        self.projectors = nn.ModuleList(LinearProjector(*sizes) for _ in range(self.number)).to(s.device)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        s, t = self.pair(student, teacher)
        check_same_batch(s, t, "student_feature", "teacher_feature")
        (s, counts), (t, _) = pooled(s, batch.mask, "student_feature"), pooled(t, batch.mask, "teacher_feature")
        projected = [layer(s).relu() if self.relu else layer(s) for layer in self.ready("projectors")]
        return pefd_loss(sum(projected[1:], projected[0]) / len(projected), t, mask=counts)
