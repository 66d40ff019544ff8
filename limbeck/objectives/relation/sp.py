"""Similarity-preserving distillation (SP): pairs of samples as alike for the student as for the teacher."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.layers import LayerObjective, Tap
from limbeck.core.objective import Contract
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import Reduction, reduce
from limbeck.core.relations import gram, paired_rows, unit
from limbeck.core.trace import Trace


@without_autocast
def sp_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared distance between the similarity matrices of a batch, each row of length 1.

    .. math::
        L = \frac 1 {B^2} \left\| G^S - G^T \right\|_F^2, \qquad
        G_{i,:} = \frac{\tilde G_{i,:}}{\| \tilde G_{i,:} \|_2}, \quad \tilde G = Q Q^\top

    The loss ties the samples of a batch together: the loss of a batch is not the mean of the losses of its parts. A row
    of length 0 stays 0 and passes no gradient.

    Args:
        student_feature: ``[B, *]``; flattened to one row a sample, which makes :math:`Q`.
        teacher_feature: ``[B, *]``, of any other shape; detached.
        mask: Booleans ``[B]``, True where a sample counts; or over the first dimensions of both features (tokens),
            where a place left out is 0 in both.
        reduction: ``"mean"``; ``"sum"``, the mean times the count; ``"none"``: ``[B]``, the part of each row.

    Raises:
        TensorError: Features of different batch sizes, or a mask that does not fit.

    Source:
        Tung and Mori, "Similarity-Preserving Knowledge Distillation", 2019, arXiv 1907.09682, equations 1 to 4.

    Example:
        >>> import torch
        >>> sp_loss(torch.eye(2), torch.ones(2, 3))
        tensor(0.2929)
    """
    student, teacher, counts = paired_rows(student_feature, teacher_feature, mask)
    gap = (unit(gram(student)) - unit(gram(teacher))).square()
    number = len(gap) if counts is None else counts.sum().clamp(min=1)  # what does not count is 0 in both matrices
    return reduce(gap.sum(dim=1) / number, counts, reduction)


@register(
    Card(
        key="sp",
        name="SP",
        title="Similarity-Preserving Knowledge Distillation",
        year=2019,
        arxiv="1907.09682",
        knowledge="relation",
        equation=r"\frac 1 {B^2} \left\| G^S - G^T \right\|_F^2, \quad "
        r"G_{i,:} = \tilde G_{i,:} / \| \tilde G_{i,:} \|_2, \quad \tilde G = Q Q^\top",
        use="For feature maps of any shape and width: nothing is learned beside the student, and one matrix product is "
        "all it costs. Wants batches in which classes come several times; goes well with KD.",
        defaults={"tap": "the last layer of maps, as in RepDistiller; the paper sums over pairs of layers"},
        evidence="parity",
        evidence_note="value and gradient of HobbitLong/RepDistiller@b84f547 (which the paper's author verified) and "
        "megvii-research/mdistiller@a08d46f; torchdistill gives rows a sum of 1 instead of a length of 1",
        with_labels={"cross_entropy": 1.0},
        weight=3000.0,
    ),
    sp_loss,
)
class SP(LayerObjective):
    """Similarity-preserving distillation, summed over pairs of layers; see ``limbeck.functional.sp_loss``.

    Args:
        tap: Where to listen: a place, or several, paired in order (a plural role: by resolution or depth).
        teacher_tap: The teacher's, where they are called otherwise.

    >>> loss = 3000.0 * SP(["layer2", "layer3"])
    """

    contract = Contract(normalizer="samples", mask=True, decomposes=False)

    def __init__(self, tap: Tap = "stages:-1", teacher_tap: Tap | None = None) -> None:
        super().__init__(tap, teacher_tap)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        losses = [sp_loss(s, t, mask=batch.mask) for s, t in self.pairs(student, teacher)]
        return sum(losses[1:], losses[0])
