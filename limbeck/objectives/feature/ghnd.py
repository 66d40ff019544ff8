"""Generalised head network distillation (GHND): the student's layers, one by one, equal the teacher's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import ConfigError, TensorError
from limbeck.core.layers import SameWidth, Tap
from limbeck.core.objective import Contract
from limbeck.core.reduction import Reduction, check_features, reduce, widen
from limbeck.core.relations import summed
from limbeck.core.trace import Trace


def ghnd_loss(
    student_features: Sequence[Tensor],
    teacher_features: Sequence[Tensor],
    *,
    weights: Sequence[float] | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared distance between layers, summed over their elements and over the layers.

    .. math:: L = \sum_l \lambda_l \left\| f^S_l - f^T_l \right\|_2^2

    With one layer, the end of the head, it is head network distillation (``hnd``). The authors' code adds up the batch,
    too; here it is averaged.

    Args:
        student_features: One tensor a layer, ``[B, *]``.
        teacher_features: The same shapes; detached.
        weights: :math:`\lambda`; 1 each, as in the authors' runs, by default.
        mask: Booleans, True where a sample ``[B]`` or, over the first dimensions of every layer, a place counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Other numbers of layers, or layers of other shapes.
        ConfigError: Not one weight a layer.

    Source:
        Matsubara and Levorato, "Neural Compression and Filtering for Edge-assisted Real-time Object Detection in
        Challenged Networks", 2020, arXiv 2007.15818; of one layer: Matsubara et al., "Head Network Distillation", IEEE
        Access, 2020.

    Example:
        >>> import torch
        >>> ghnd_loss([torch.ones(2, 3), torch.ones(2, 2)], [torch.zeros(2, 3), torch.zeros(2, 2)])
        tensor(5.)
    """
    number = len(student_features)
    if number != len(teacher_features) or not number:
        raise TensorError(
            "layers are compared one by one",
            where="teacher_features",
            found=f"{len(teacher_features)} layers",
            wanted=f"{number or 'at least 1'} as in student_features",
        )
    if weights is not None and len(weights) != number:
        raise ConfigError("one weight a layer", where="weights", found=len(weights), wanted=number)
    total: list[Tensor] = []
    counts: Tensor | None = None
    for student, teacher, weight in zip(student_features, teacher_features, weights or [1.0] * number, strict=True):
        check_features(student, teacher)
        values, counts = summed((widen(student) - widen(teacher.detach())).square(), mask)
        total.append(weight * values)
    return reduce(torch.stack(total).sum(dim=0), counts, reduction)


@register(
    Card(
        key="ghnd",
        name="GHND",
        title="Neural Compression and Filtering for Edge-assisted Real-time Object Detection in Challenged Networks",
        year=2020,
        arxiv="2007.15818",
        code="yoshitomo-matsubara/hnd-ghnd-object-detectors",
        knowledge="feature",
        equation=r"\sum_l \lambda_l \| f^S_l - f^T_l \|_2^2",
        use="For a student whose first layers are new (a bottleneck to send over a network, say) and whose others are "
        "the teacher's: learn the new ones, freeze the others, labels are not needed. Or as hints at several layers.",
        defaults={
            "tap": "the last layer at each resolution, as in the authors' detectors",
            "weights": "1 each, as in the authors' runs",
        },
        evidence="parity",
        evidence_note="value and gradients of yoshitomo-matsubara/hnd-ghnd-object-detectors@7ebbe03",
        choices=(
            "The mean over samples; the authors' code adds up the batch.",
            "In the paper the sum stands alone, for a student whose tail is the teacher's; beside the labels it is "
            "weighed by 1/1000, as OFD weighs the like sum.",
            "Layers of different widths or sizes, which the paper does not have: the student's pass through a learned "
            "linear map, the larger map is pooled.",
        ),
        tasks=("classification", "detection"),
        with_labels={"cross_entropy": 1.0},
        weight=0.001,
    ),
    ghnd_loss,
)
class GHND(SameWidth):
    """Generalised head network distillation; see ``limbeck.functional.ghnd_loss``.

    Args:
        tap: Where: a plural role, whose layers are paired by resolution, or layers, paired in order.
        teacher_tap: The teacher's, where they are called otherwise.
        weights: One a layer.

    >>> loss = GHND(["layer2", "layer3"], weights=[1.0, 0.5])
    """

    contract = Contract(normalizer="samples", mask=True)

    def __init__(self, tap: Tap = "stages", teacher_tap: Tap | None = None, weights: list[float] | None = None) -> None:
        super().__init__(tap, teacher_tap)
        self.weights = weights

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        students, teachers = zip(*self.features(student, teacher), strict=True)
        return ghnd_loss(students, teachers, weights=self.weights, mask=batch.mask)
