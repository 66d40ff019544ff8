"""Regression on the teacher's logits."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_logits, reduce, widen
from limbeck.core.trace import Trace


def logit_mse_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Mean squared distance between the logits.

    .. math:: L = \frac 1 C \sum_c (z^S_c - z^T_c)^2

    Where both logits have mean zero this is twice the limit of KD for :math:`T \to \infty`. Unlike KD it also asks for
    the teacher's mean logit, which no prediction depends on.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Not used; taken so that all response losses are called alike.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.

    Source:
        Ba and Caruana, "Do Deep Nets Really Need to be Deep?", 2013, arXiv 1312.6184; compared with KD by Kim et al.,
        "Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in Knowledge Distillation", 2021, arXiv
        2105.08919.

    Example:
        >>> import torch
        >>> logit_mse_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 2.0]]))
        tensor(2.)
    """
    check_logits(student_logits, teacher_logits, labels)
    gap = widen(student_logits) - widen(teacher_logits.detach())
    return reduce(gap.square().mean(dim=-1), mask, reduction)


@register(
    Card(
        key="logit_mse",
        name="Logit regression",
        title="Do Deep Nets Really Need to be Deep?",
        year=2013,
        arxiv="1312.6184",
        code="jhoon-oh/kd_data",
        knowledge="response",
        equation=r"\frac 1 C \sum_c (z^S_c - z^T_c)^2",
        use="Alone, without labels, where the student is large enough to follow the teacher closely: no temperature to "
        "tune, and in Kim et al. better than KD on clean labels. Not where labels are noisy.",
        evidence="parity",
        evidence_note="value and gradient of jhoon-oh/kd_data@6aa1822 (mse_logit), the code of Kim et al.",
        choices=("The mean over classes, as in that code; Ba and Caruana write half the sum, Kim et al. the sum.",),
    ),
    logit_mse_loss,
)
class LogitMSE(Objective):
    """Regression on the teacher's logits; see ``limbeck.functional.logit_mse_loss``.

    >>> loss = LogitMSE()
    """

    contract = Contract(normalizer="positions", mask=True)
    student_taps = teacher_taps = ("logits",)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return logit_mse_loss(student.logits, teacher.logits, mask=batch.mask)
