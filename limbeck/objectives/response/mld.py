"""Multi-label logits distillation (the response part of L2D): one yes or no a class, each compared by itself."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import binary_kl_rows
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_logits, reduce
from limbeck.core.trace import Trace


def mld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence of each class's Bernoulli variable from the teacher's, summed over classes.

    .. math:: L = \sum_c p^T_c \log \frac{p^T_c}{p^S_c} + (1 - p^T_c) \log \frac{1 - p^T_c}{1 - p^S_c}, \qquad
        p = \sigma(z)

    A softmax would make the labels of a sample compete; here each class is a problem of its own. The mean runs over
    samples, never over classes.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Not used; taken so that all response losses are called alike.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.

    Source: Yang et al., "Multi-Label Knowledge Distillation", 2023, arXiv 2308.06453.

    Example:
        >>> import torch
        >>> mld_loss(torch.zeros(1, 2), torch.tensor([[1.0, -2.0]]))
        tensor(0.4388)
    """
    check_logits(student_logits, teacher_logits)
    return reduce(binary_kl_rows(teacher_logits.detach(), student_logits), mask, reduction)


@register(
    Card(
        key="mld",
        name="MLD",
        title="Multi-Label Knowledge Distillation",
        year=2023,
        arxiv="2308.06453",
        code="penghui-yang/L2D",
        knowledge="response",
        equation=r"\sum_c p^T_c \log \frac{p^T_c}{p^S_c} + (1 - p^T_c) \log \frac{1 - p^T_c}{1 - p^S_c}",
        use="The first thing to try where a sample may have any number of labels: KD with sigmoids in the place of the "
        "softmax. Beside it, cled and iled compare embeddings.",
        evidence="parity",
        evidence_note="value and gradient of penghui-yang/L2D@ea7fa55",
        choices=(
            "From logits, without the code's clamping of probabilities at 1e-8, so that a sure teacher keeps its "
            "digits.",
            "Weight 10 / 64: the code adds 10 times the mean over a batch of 64 to the labels' loss summed over it.",
        ),
        tasks=("multilabel",),
        with_labels={"binary_cross_entropy": 1.0},
        weight=10 / 64,
    ),
    mld_loss,
)
class MLD(Objective):
    """Multi-label logits distillation; see ``limbeck.functional.mld_loss``.

    >>> from limbeck.objectives import BinaryCrossEntropy
    >>> loss = BinaryCrossEntropy() + 10 / 64 * MLD()
    """

    contract = Contract(normalizer="positions", mask=True)
    student_taps = teacher_taps = ("logits",)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return mld_loss(student.logits, teacher.logits, mask=batch.mask)
