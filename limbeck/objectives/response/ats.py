"""Asymmetric temperature scaling (ATS): the teacher's label is softened more than its other classes."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, soften
from limbeck.core.labels import class_labels
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_logits, check_positive, fit_mask, reduce, widen
from limbeck.core.trace import Trace


def ats_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    correct: float = 4.0,
    wrong: float = 2.0,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""KD from a teacher whose logit of the label has a higher temperature than the others.

    .. math::
        L = T^2\, \mathrm{KL}\left( p \,\|\, \mathrm{softmax}(z^S / T) \right), \qquad
        p_c = \frac{e^{z^T_c / \tau_c}}{\sum_j e^{z^T_j / \tau_j}}, \quad
        \tau_c = \begin{cases} \tau_1 & c = y \\ \tau_2 & \text{else} \end{cases}

    A large teacher is sure: at one temperature either the label takes all probability or the other classes become
    alike. Two temperatures keep the label in bounds and the other classes distinct. With three equal temperatures this
    is KD; with others a constant added to all of the teacher's logits changes what it says.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Integers ``[B, *]``, negative where a place has no label; such a place does not count.
        correct: :math:`\tau_1`; 4 in the authors' example.
        wrong: :math:`\tau_2`; 2 in the authors' example.
        temperature: T, the student's; 1 in the authors' code.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count and have a label, ``"sum"``, or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: No labels, soft labels, or shapes that differ.
        ConfigError: A temperature that is not above zero.

    Source:
        Li et al., "Asymmetric Temperature Scaling Makes Larger Networks Teach Well Again", 2022, arXiv 2210.04427.

    Example:
        >>> import torch
        >>> ats_loss(torch.zeros(1, 3), torch.tensor([[8.0, 2.0, 0.0]]), torch.tensor([0]))
        tensor(0.2662)
    """
    check_logits(student_logits, teacher_logits, labels)
    for name, value in (("correct", correct), ("wrong", wrong), ("temperature", temperature)):
        check_positive(value, name)
    target, labelled = class_labels(labels, student_logits.shape[-1], "ATS")
    teacher = widen(teacher_logits.detach())
    temperatures = torch.full_like(teacher, wrong).scatter(-1, target.unsqueeze(-1), correct)
    values = temperature**2 * kl_rows(soften(teacher, temperatures), soften(student_logits, temperature))
    return reduce(values, labelled if mask is None else labelled & fit_mask(mask, values), reduction)


@register(
    Card(
        key="ats",
        name="ATS",
        title="Asymmetric Temperature Scaling Makes Larger Networks Teach Well Again",
        year=2022,
        arxiv="2210.04427",
        code="lxcnju/ATS-LargeKD",
        knowledge="response",
        equation=r"T^2\, \mathrm{KL}\left( \mathrm{softmax}(z^T_c / \tau_c) \,\|\, \mathrm{softmax}(z^S / T) \right), "
        r"\quad \tau_y = \tau_1 > \tau_2 = \tau_{c \ne y}",
        use="In place of KD where a larger, surer teacher teaches no better than a smaller one.",
        defaults={
            "correct": "4, as in the authors' example",
            "wrong": "2, as in the authors' example; their code searches both from 1 to 6",
            "temperature": "1, as in the authors' code",
        },
        evidence="parity",
        evidence_note="value and gradient of lxcnju/ATS-LargeKD@8a770e7 (distill.py)",
        choices=(
            "The divergence where the code has the cross-entropy: the same gradient.",
            "The teacher's logits are taken as they are, not centred, as in the paper and its code.",
        ),
        needs=("labels",),
        with_labels={"cross_entropy": 0.5},
        weight=0.5,
    ),
    ats_loss,
)
class ATS(Objective):
    """Asymmetric temperature scaling; see ``limbeck.functional.ats_loss``.

    Args:
        correct: Temperature of the teacher's label.
        wrong: Temperature of the teacher's other classes.
        temperature: The student's.

    >>> loss = 0.5 * ATS(correct=5.0, wrong=3.0)
    """

    contract = Contract(normalizer="labels", at_equal=None, mask=True, spare_class=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, correct: float = 4.0, wrong: float = 2.0, temperature: float = 1.0) -> None:
        super().__init__()
        for name, value in (("correct", correct), ("wrong", wrong), ("temperature", temperature)):
            check_positive(value, name)
        self.correct, self.wrong, self.temperature = correct, wrong, temperature

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return ats_loss(
            student.logits,
            teacher.logits,
            batch.require("labels"),
            correct=self.correct,
            wrong=self.wrong,
            temperature=self.temperature,
            mask=batch.mask,
        )
