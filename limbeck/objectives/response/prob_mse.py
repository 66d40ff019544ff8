"""Regression on the teacher's probabilities."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_logits, reduce, widen
from limbeck.core.trace import Trace


def prob_mse_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Mean squared distance between the probabilities.

    .. math:: L = \frac 1 C \sum_c (p^S_c - p^T_c)^2, \qquad p = \mathrm{softmax}(z)

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Not used; taken so that all response losses are called alike.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.

    Source:
        Tarvainen and Valpola, "Mean teachers are better role models", 2017, arXiv 1703.01780 (the consistency cost);
        Borup and Andersen, "Even your Teacher Needs Guidance", 2021, arXiv 2102.13088.

    Example:
        >>> import torch
        >>> prob_mse_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[50.0, 0.0]]))
        tensor(0.2500)
    """
    check_logits(student_logits, teacher_logits, labels)
    gap = widen(student_logits).softmax(dim=-1) - widen(teacher_logits.detach()).softmax(dim=-1)
    return reduce(gap.square().mean(dim=-1), mask, reduction)


@register(
    Card(
        key="prob_mse",
        name="Probability regression",
        title="Mean teachers are better role models: Weight-averaged consistency targets improve semi-supervised deep "
        "learning results",
        year=2017,
        arxiv="1703.01780",
        knowledge="response",
        equation=r"\frac 1 C \sum_c (p^S_c - p^T_c)^2",
        use="Where the teacher may be badly wrong: unlike a divergence it is bounded. The consistency cost of mean "
        "teachers, and beside brier the loss of scheme kernel_self_distill.",
        evidence="formula",
        evidence_note="torch.nn.functional.mse_loss of both softmaxes",
        choices=("The mean over classes, as in mean_squared_error of Borup and Andersen's code; other codes sum.",),
        with_labels={"cross_entropy": 1.0},
    ),
    prob_mse_loss,
)
class ProbabilityMSE(Objective):
    """Regression on the teacher's probabilities; see ``limbeck.functional.prob_mse_loss``.

    >>> loss = ProbabilityMSE()
    """

    contract = Contract(normalizer="positions", mask=True)
    student_taps = teacher_taps = ("logits",)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return prob_mse_loss(student.logits, teacher.logits, mask=batch.mask)
