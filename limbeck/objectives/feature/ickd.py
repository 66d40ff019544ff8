"""Inter-channel correlation (ICKD): how alike a layer's channels are, the same for student and teacher."""

from __future__ import annotations

from torch import Tensor, nn

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.errors import TensorError
from limbeck.core.layers import LayerObjective, Tap
from limbeck.core.layout import to_map
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.precision import without_autocast
from limbeck.core.projectors import connector
from limbeck.core.reduction import Reduction, reduce, widen
from limbeck.core.relations import check_same_batch, gram, unit
from limbeck.core.trace import Trace


@without_autocast
def ickd_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared distance between each sample's channel correlations, summed along a row, averaged over the rows.

    .. math::
        L = \frac 1 C \left\| G^S - G^T \right\|_F^2, \qquad
        G_{c,:} = \frac{\tilde G_{c,:}}{\| \tilde G_{c,:} \|_2}, \quad \tilde G = F F^\top, \quad
        F \in \mathbb{R}^{C \times H W}

    Rows have length 1, so the two maps may differ in size. A channel that is 0 everywhere has no correlations and
    passes no gradient.

    Args:
        student_feature: Maps ``[B, C, H, W]`` or tokens ``[B, N, C]`` (without those that stand for no place), already
            embedded to the teacher's channels.
        teacher_feature: The same with as many channels, of any size; detached.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: No maps or tokens, or other numbers of samples or channels.

    Source:
        Liu et al., "Exploring Inter-Channel Correlation for Diversity-Preserved Knowledge Distillation", ICCV 2021.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]]), torch.ones(1, 2, 1, 2)
        >>> ickd_loss(student, teacher)
        tensor(0.5858)
    """
    student, teacher = to_map(student_feature, "student_feature"), to_map(teacher_feature, "teacher_feature")
    check_same_batch(student, teacher, "student_feature", "teacher_feature")
    if student.shape[1] != teacher.shape[1]:
        raise TensorError(
            "channels are compared one by one",
            where="student_feature",
            found=f"{list(student.shape)} beside the teacher's {list(teacher.shape)}",
            wanted=f"{teacher.shape[1]} channels",
        )
    gap = _correlations(student) - _correlations(teacher.detach()).to(widen(student).dtype)
    return reduce(gap.square().sum(dim=2).mean(dim=1), mask, reduction)


def _correlations(maps: Tensor) -> Tensor:
    return unit(gram(widen(maps).flatten(2)))


@register(
    Card(
        key="ickd",
        name="ICKD",
        title="Exploring Inter-Channel Correlation for Diversity-Preserved Knowledge Distillation",
        year=2021,
        code="ADLab-AutoDrive/ICKD",
        knowledge="feature",
        equation=r"\frac 1 C \left\| G^S - G^T \right\|_F^2, \quad G_{c,:} = \tilde G_{c,:} / \| \tilde G_{c,:} \|_2, "
        r"\quad \tilde G = F F^\top",
        use="For maps of one layer in networks of different width and resolution: it keeps how diverse the channels "
        "are rather than their values. Goes well with KD.",
        defaults={"tap": "the last layer of maps, as in the authors' code"},
        evidence="parity",
        evidence_note="value and gradient of ADLab-AutoDrive/ICKD@403b8d3, after the embedding",
        choices=(
            "Rows of length 1 and a sum along each, as in the authors' code, whose weight is given; the paper writes "
            "the mean over plain inner products.",
            "The form for classification (ICKD-C); that for segmentation does the same in each cell of a grid.",
        ),
        with_labels={"cross_entropy": 1.0},
        weight=2.5,
    ),
    ickd_loss,
)
class ICKD(LayerObjective):
    """Inter-channel correlation; see ``limbeck.functional.ickd_loss``.

    The student's channels are embedded to the teacher's number by a 1x1 convolution and batch norm, as in the authors'
    code; both are learned, and dropped after training.

    Args:
        tap: Where to listen: a layer of maps or tokens.
        teacher_tap: The teacher's, where it is called otherwise.

    >>> loss = 2.5 * ICKD("layer3")
    """

    # The embedding's batch norm ties samples together.
    contract = Contract(normalizer="samples", at_equal=None, decomposes=False)
    embed: nn.Module | None

    def __init__(self, tap: Tap = "stages:-1", teacher_tap: Tap | None = None) -> None:
        super().__init__(tap, teacher_tap)
        self.embed = None

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        self.embed = connector(*(to_map(f) for f in self.pair(student, teacher)))

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        s, t = self.pair(student, teacher)
        return ickd_loss(self.ready("embed")(to_map(s, "student_feature")), t)
