"""SimKD: the student ends in the teacher's own classifier, and learns nothing but the feature before it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import ConfigError
from limbeck.core.layout import aligned
from limbeck.core.objective import Contract, DataInfo, Objective
from limbeck.core.reduction import Reduction, check_features, reduce, widen
from limbeck.core.relations import channel_dim
from limbeck.core.trace import Trace


def simkd_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Mean squared distance of the student's projected feature from the teacher's.

    .. math:: L = \frac 1 n \left\| P(f^S) - f^T \right\|_2^2

    ``n`` is the number of the feature's elements, so it is a mean over samples, places and channels, as in the authors'
    code. Of maps of different sizes the larger is averaged to the smaller.

    Args:
        student_feature: What the projector gave: ``[B, C, H, W]``, tokens ``[B, T, D]`` or ``[B, D]``.
        teacher_feature: As wide; detached.
        mask: Booleans, True where a place counts: ``[B]``, or ``[B, T]`` for tokens, ``[B, H, W]`` for maps.
        reduction: ``"mean"`` over places that count, ``"sum"`` over them (of the mean over channels), or ``"none"``.

    Raises:
        TensorError: Features that do not fit each other.

    Source:
        Chen et al., "Knowledge Distillation with the Reused Teacher Classifier", 2022, arXiv 2203.14001, equation 3.

    Example:
        >>> import torch
        >>> simkd_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([[1.0, 1.0]]))
        tensor(2.)
    """
    student, teacher = aligned(student_feature, teacher_feature)
    check_features(student, teacher)
    values = (widen(student) - widen(teacher.detach())).square().mean(dim=channel_dim(student))
    return reduce(values, mask, reduction)


@register(
    Card(
        key="simkd",
        name="SimKD",
        title="Knowledge Distillation with the Reused Teacher Classifier",
        year=2022,
        arxiv="2203.14001",
        code="DefangChen/SimKD",
        knowledge="feature",
        equation=r"\frac 1 n \left\| P(f^S) - f^T \right\|_2^2",
        use="When the student may ship a projector and the teacher's classifier beside its own layers: it then needs "
        "neither labels nor any other loss, and has no weight to tune. Both networks convolutional with average "
        "pooling; with `feature: pooled` anything else.",
        defaults={"feature": "the last map before pooling, as in the paper"},
        evidence="parity",
        evidence_note="value, gradients and prediction of DefangChen/SimKD@2b389c3, projector included",
        choices=(
            "The projector ships, as the paper says; it stands behind the student's last map, wherever its pooling is.",
            "Its width is half the teacher's (`head: {reused: {factor: 2}}`), the paper's best and its code's default.",
            "Where the teacher's feature can be negative (transformers), which the paper does not consider, the "
            "projector ends without its ReLU.",
        ),
        head="reused",
    ),
    simkd_loss,
)
class SimKD(Objective):
    """The projected feature of a student with the teacher's classifier; see ``limbeck.functional.simkd_loss``.

    The student has the head ``reused`` (``limbeck.models.put_head``), which recipes, comparisons and
    ``limbeck.distill`` put on by themselves.

    Args:
        feature: ``"map"`` compares the last maps, ``"pooled"`` what enters the classifiers; the head's is the same.

    >>> SimKD().student_taps
    ('head.projector', 'logits@weight')
    """

    contract = Contract(normalizer="positions", mask=True)

    def __init__(self, feature: Literal["map", "pooled"] = "map") -> None:
        super().__init__()
        self.feature = feature
        self.teacher_tap = "stages:-1" if feature == "map" else "penultimate"
        self.student_taps = ("head.projector", "logits@weight")
        self.teacher_taps = (self.teacher_tap, "logits@weight")

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        own, other = student["logits@weight"], teacher["logits@weight"]
        if own.shape != other.shape or not torch.allclose(own.float(), other.float().to(own.device)):
            raise ConfigError(
                "the student's classifier is not the teacher's",
                where="simkd",
                found=f"weights {list(own.shape)} beside the teacher's {list(other.shape)}",
                remedy="put_head(student, 'reused', example=batch, teacher=teacher) gives it the teacher's",
            )

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return simkd_loss(student["head.projector"], teacher[self.teacher_tap], mask=batch.mask)
