"""Probabilistic knowledge transfer (PKT): who a sample's neighbours are, as a probability."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.objective import Contract, Objective
from limbeck.core.precision import without_autocast
from limbeck.core.reduction import Reduction, check_positive, reduce
from limbeck.core.relations import cosines, paired_rows
from limbeck.core.trace import Trace


@without_autocast
def pkt_loss(
    student_feature: Tensor,
    teacher_feature: Tensor,
    *,
    include_self: bool = False,
    eps: float = 1e-7,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence between the probabilities with which each sample would pick another of the batch as its neighbour.

    .. math::
        L = \frac 1 B \sum_i \sum_{j \ne i} p^T_{j|i} \log \frac{p^T_{j|i} + \epsilon}{p^S_{j|i} + \epsilon}, \qquad
        p_{j|i} = \frac{K(x_i, x_j)}{\sum_{k \ne i} K(x_i, x_k)}, \quad
        K(a, b) = \frac 1 2 \left( \frac{a^\top b}{\|a\| \|b\|} + 1 \right)

    The loss ties the samples of a batch together: the loss of a batch is not the mean of the losses of its parts. The
    authors' code averages over pairs, so it is ``B`` times smaller than the mean over samples here.

    Args:
        student_feature: ``[B, *]``; flattened to one row a sample.
        teacher_feature: ``[B, *]``, of any width; detached.
        include_self: Let a sample pick itself, as the authors' code does; the paper's sums leave it out.
        eps: In the logarithm, as in the authors' code: opposite samples have probability 0.
        mask: Booleans ``[B]``, True where a sample counts; or over the first dimensions of both features (tokens),
            where a place left out is 0 in both.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Raises:
        TensorError: Features of different batch sizes, or a mask that does not fit.
        ConfigError: ``eps`` not above zero.

    Source:
        Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", 2018,
        arXiv 1803.10837, equations 3 to 8.

    Example:
        >>> import torch
        >>> teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> pkt_loss(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), teacher)
        tensor(0.1155)
    """
    check_positive(eps, "eps")
    student, teacher, counts = paired_rows(student_feature, teacher_feature, mask)
    others = torch.ones(2 * (len(student),), dtype=torch.bool, device=student.device)
    if not include_self:
        others = others & ~torch.eye(len(student), dtype=torch.bool, device=student.device)
    if counts is not None:
        others = others & counts
    p, q = _neighbours(teacher, others), _neighbours(student, others)
    return reduce((p * ((p + eps) / (q + eps)).log()).sum(dim=1), counts, reduction)


def _neighbours(x: Tensor, others: Tensor) -> Tensor:
    """``[B, B]``: the probability with which the sample of a row picks that of a column."""
    kernel = ((cosines(x) + 1) / 2).clamp(min=0) * others  # rounding takes the cosine of opposites below -1
    total = kernel.sum(dim=1, keepdim=True)
    return kernel / total.masked_fill(total == 0, 1.0)


@register(
    Card(
        key="pkt",
        name="PKT",
        title="Learning Deep Representations with Probabilistic Knowledge Transfer",
        year=2018,
        arxiv="1803.10837",
        code="passalis/probabilistic_kt",
        knowledge="relation",
        equation=r"\frac 1 B \sum_i \sum_{j \ne i} p^T_{j|i} \log \frac{p^T_{j|i}}{p^S_{j|i}}, \quad "
        r"p_{j|i} = K(x_i, x_j) / \sum_{k \ne i} K(x_i, x_k)",
        use="For representations, as in retrieval: it matches neighbourhoods, so widths may differ, and the teacher "
        "may be hand-made features or another modality. Cheap; goes well with KD.",
        defaults={
            "include_self": "no, as in the paper; the authors' code lets a sample be its own neighbour",
            "eps": "1e-7, as in the authors' code",
            "tap": "what enters the classifier, as in RepDistiller",
        },
        evidence="parity",
        evidence_note="with include_self, value and gradient of passalis/probabilistic_kt@a58fd1b, "
        "HobbitLong/RepDistiller@b84f547 and megvii-research/mdistiller@a08d46f",
        choices=(
            "A sample is not its own neighbour, as the paper's sums say; include_self gives the released code's form.",
            "The mean over samples of the divergence; the code's mean over pairs is B times smaller. So the weight is "
            "the 30000 of the CRD benchmark over its batch of 64.",
        ),
        tasks=("classification", "embedding"),
        with_labels={"cross_entropy": 1.0},
        weight=470.0,
    ),
    pkt_loss,
)
class PKT(Objective):
    """Probabilistic knowledge transfer; see ``limbeck.functional.pkt_loss``.

    Args:
        tap: The representation to compare.
        teacher_tap: The teacher's, where it is called otherwise.
        include_self: Let a sample be its own neighbour.
        eps: In the logarithm.

    >>> loss = 470.0 * PKT()
    """

    contract = Contract(normalizer="samples", mask=True, decomposes=False)

    def __init__(
        self,
        tap: str = "penultimate",
        teacher_tap: str | None = None,
        include_self: bool = False,
        eps: float = 1e-7,
    ) -> None:
        super().__init__()
        check_positive(eps, "eps")
        self.tap, self.teacher_tap = tap, teacher_tap or tap
        self.student_taps, self.teacher_taps = (self.tap,), (self.teacher_tap,)
        self.include_self, self.eps = include_self, eps

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        s, t = student[self.tap], teacher[self.teacher_tap]
        return pkt_loss(s, t, include_self=self.include_self, eps=self.eps, mask=batch.mask)
