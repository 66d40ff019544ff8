"""Transformed teacher matching (TTM): only the teacher is softened; the student answers as it is."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_logits, check_positive, reduce
from limbeck.core.trace import Trace


def ttm_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    gamma: float = 0.1,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence of the student's prediction from the teacher's raised to a power.

    .. math:: L = \mathrm{KL}(p^{(\gamma)} \,\|\, q), \qquad p^{(\gamma)}_c = \frac{p_c^\gamma}{\sum_j p_j^\gamma}

    The power :math:`\gamma` is the temperature :math:`1 / \gamma`, of the teacher alone: :math:`q` is the student's
    plain softmax. Compared with KD this adds a Rényi entropy of the student, which keeps it from being too sure. At
    equality the loss is not 0, unless :math:`\gamma` is 1.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Not used; taken so that all response losses are called alike.
        gamma: :math:`\gamma`; 0.1 in the authors' example.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.
        ConfigError: ``gamma`` not above zero.

    Source:
        Zheng and Yang, "Knowledge Distillation Based on Transformed Teacher Matching", 2024, arXiv 2402.11148.

    Example:
        >>> import torch
        >>> ttm_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(0.5384)
    """
    check_logits(student_logits, teacher_logits, labels)
    check_positive(gamma, "gamma")
    return reduce(kl_rows(soften(teacher_logits.detach(), 1 / gamma), soften(student_logits)), mask, reduction)


@register(
    Card(
        key="ttm",
        name="TTM",
        title="Knowledge Distillation Based on Transformed Teacher Matching",
        year=2024,
        arxiv="2402.11148",
        code="zkxufo/TTM",
        knowledge="response",
        equation=r"\mathrm{KL}(p^{(\gamma)} \,\|\, q), \quad p^{(\gamma)}_c = p_c^\gamma / \sum_j p_j^\gamma",
        use="In place of KD where accuracy counts and calibration can follow later: the student learns soft answers as "
        "they are, which regularises it and leaves it less sure than it may be. See WTTM for weights by sample.",
        defaults={"gamma": "0.1 (a temperature of 10), as in the authors' example on CIFAR-100"},
        evidence="parity",
        evidence_note="value and gradient of zkxufo/TTM@fe457b3 (TTM)",
        with_labels={"cross_entropy": 1.0},
        choices=(
            "The weight 1 / gamma, which gives its gradient the size of KD's. The authors' example on CIFAR-100 has "
            "45; on ten classes that drove a student into answering everything alike.",
        ),
        weight=10.0,
    ),
    ttm_loss,
)
class TTM(Objective):
    """Transformed teacher matching; see ``limbeck.functional.ttm_loss``.

    Args:
        gamma: The power of the teacher's probabilities.

    >>> loss = 45.0 * TTM(gamma=0.1)  # the authors' example on CIFAR-100
    """

    contract = Contract(normalizer="positions", at_equal=None, mask=True, spare_class=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, gamma: float = 0.1) -> None:
        super().__init__()
        check_positive(gamma, "gamma")
        self.gamma = gamma

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return ttm_loss(student.logits, teacher.logits, gamma=self.gamma, mask=batch.mask)
