"""Weighted soft labels for distillation (WSLD): soft labels count where the student trails the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import cross_entropy_rows, soften
from limbeck.core.labels import class_labels
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_logits, check_positive, fit_mask, reduce
from limbeck.core.trace import Trace


def wsld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 2.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy with the teacher's softened prediction, weighted by how both fare with the label.

    .. math::
        L = T^2 \left( 1 - \exp \left( -\frac{\log q_y}{\log p_y} \right) \right)
        \left( -\sum_c p^{(T)}_c \log q^{(T)}_c \right)

    :math:`p` and :math:`q` are the teacher's and the student's softmax, :math:`p^{(T)}` and :math:`q^{(T)}` those at
    temperature T. The weight is a constant for the gradient: near 0 where the student knows the label and the teacher
    does not (there soft labels would only add variance), near 1 where it trails far behind. Being a cross-entropy, the
    loss is not 0 at equality.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Integers ``[B, *]``, negative where a place has no label; such a place does not count.
        temperature: T; 2 in the paper's ImageNet runs.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count and have a label, ``"sum"``, or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: No labels, soft labels, or shapes that differ.
        ConfigError: A temperature that is not above zero.

    Source:
        Zhou et al., "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective", 2021,
        arXiv 2102.00650.

    Example:
        >>> student, teacher = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[3.0, 2.0, 1.0]])
        >>> wsld_loss(student, teacher, torch.tensor([0]))
        tensor(5.3468)
    """
    check_logits(student_logits, teacher_logits, labels)
    check_positive(temperature, "temperature")
    target, labelled = class_labels(labels, student_logits.shape[-1], "WSLD")
    teacher_logits = teacher_logits.detach()
    with torch.no_grad():
        trail, lead = (
            -soften(z).gather(-1, target.unsqueeze(-1)).squeeze(-1) for z in (student_logits, teacher_logits)
        )
        # A teacher that is right beyond doubt, and a student too, gives 0 / 0: the student needs nothing more.
        weight = -torch.expm1(-trail / (lead + 1e-7))
    soft = cross_entropy_rows(soften(teacher_logits, temperature).exp(), soften(student_logits, temperature))
    values = temperature**2 * weight * soft
    mask = labelled if mask is None else labelled & fit_mask(mask, values)
    return reduce(values, mask, reduction)


@register(
    Card(
        key="wsld",
        name="WSLD",
        title="Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance Tradeoff Perspective",
        year=2021,
        arxiv="2102.00650",
        code="bellymonster/Weighted-Soft-Label-Distillation",
        knowledge="response",
        equation=r"T^2 \left( 1 - e^{-\log q_y / \log p_y} \right) \left( -\sum_c p^{(T)}_c \log q^{(T)}_c \right)",
        use="In place of KD where the teacher is not always better than the student: its soft labels fade out sample "
        "by sample as the student catches up.",
        defaults={"temperature": "2, the paper's value on ImageNet; 4 on CIFAR-100"},
        evidence="parity",
        evidence_note="value and gradient of bellymonster/Weighted-Soft-Label-Distillation@67820dd, and of "
        "yzd-v/cls_KD@1e5d48f (WSLDLoss)",
        choices=("1e-7 beside the teacher's cross-entropy, as in the authors' code.",),
        needs=("labels",),
        with_labels={"cross_entropy": 1.0},
        weight=2.5,
    ),
    wsld_loss,
)
class WSLD(Objective):
    """Weighted soft labels; see ``limbeck.functional.wsld_loss``.

    Args:
        temperature: T.

    >>> loss = 2.25 * WSLD(temperature=4.0)
    """

    # At equality it is the teacher's entropy, weighted by 1 - 1/e.
    contract = Contract(
        normalizer="labels", at_equal=None, mask=True, temperature="squared", spare_class=True, stop_gradient=True
    )
    student_taps = teacher_taps = ("logits",)

    def __init__(self, temperature: float = 2.0) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        self.temperature = temperature

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        labels = batch.require("labels")
        return wsld_loss(student.logits, teacher.logits, labels, temperature=self.temperature, mask=batch.mask)
