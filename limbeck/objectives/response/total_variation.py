"""Total variation distance between the teacher's and the student's prediction."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_logits, reduce, widen
from limbeck.core.trace import Trace


def total_variation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""How much probability would have to move to make the student's prediction the teacher's: between 0 and 1.

    .. math:: L = \frac 1 2 \sum_c |p_c - q_c|, \qquad p = \mathrm{softmax}(z^T),\ q = \mathrm{softmax}(z^S)

    Symmetric and bounded. Its gradient keeps its size down to equality, where it is 0, and is small where the student
    is sure and wrong: add labels or a divergence to start from nothing.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Not used; taken so that all response losses are called alike.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.

    Source:
        Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation", 2023, arXiv 2307.15190.

    Example:
        >>> import torch
        >>> total_variation_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(0.7616)
    """
    check_logits(student_logits, teacher_logits, labels)
    gap = widen(student_logits).softmax(dim=-1) - widen(teacher_logits.detach()).softmax(dim=-1)
    return reduce(0.5 * gap.abs().sum(dim=-1), mask, reduction)


@register(
    Card(
        key="total_variation",
        name="Total variation",
        title="f-Divergence Minimization for Sequence-Level Knowledge Distillation",
        year=2023,
        arxiv="2307.15190",
        code="MANGA-UOFA/fdistill",
        knowledge="response",
        equation=r"\frac 1 2 \sum_c |p_c - q_c|",
        use="Where rare classes or tokens should not rule the loss: no logarithm ever blows up. In f-DISTILL it starts "
        "from a student that was trained with KD.",
        evidence="parity",
        evidence_note="value and gradient of MANGA-UOFA/fdistill@8e2ff7c (calc_tvd_loss)",
        choices=(
            "No temperature, as in the paper.",
            "The labels beside it stand for the training on labels that comes before it in the paper.",
        ),
        tasks=("classification", "language"),
        with_labels={"cross_entropy": 1.0},
    ),
    total_variation_loss,
)
class TotalVariation(Objective):
    """Total variation distance; see ``limbeck.functional.total_variation_loss``.

    >>> from limbeck.objectives import KD
    >>> loss = 0.1 * KD() + TotalVariation()
    """

    contract = Contract(normalizer="positions", mask=True, spare_class=True)
    student_taps = teacher_taps = ("logits",)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return total_variation_loss(student.logits, teacher.logits, mask=batch.mask)
