"""Normalised KD loss (NKD): the teacher weighs the target class, and is followed among the others."""

from __future__ import annotations

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import cross_entropy_rows, log_among_others, soften
from limbeck.core.labels import class_labels
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_logits, check_positive, fit_mask, reduce, widen
from limbeck.core.trace import Trace


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    gamma: float = 1.5,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy with the teacher's target probability, and with its other classes brought to a sum of one.

    .. math::
        L = -p_y \log q_y - \gamma T^2 \sum_{c \ne y} \hat p_c \log \hat q_c, \qquad
        \hat p_c = \frac{e^{z_c / T}}{\sum_{j \ne y} e^{z_j / T}}

    :math:`p` and :math:`q` are the teacher's and the student's softmax at T = 1. In plain KD the other classes of both
    sides have different sums, so that their cross-entropy cannot become equal; here they can. With two classes the
    second part is 0. Being a cross-entropy, the loss is not 0 at equality.

    Args:
        student_logits: ``[B, *, C]`` with two classes or more.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Integers ``[B, *]``, negative where a place has no label; such a place does not count. Of soft labels
            ``[B, *, C]`` the largest is the target.
        gamma: Weight of the other classes; 1.5 in the paper, 1 for transformers.
        temperature: T of the other classes; 1 in the paper.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count and have a label, ``"sum"``, or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: No labels, fewer than two classes, or shapes that differ.
        ConfigError: A temperature that is not above zero.

    Source:
        Yang et al., "From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized
        Loss and Customized Soft Labels", 2023, arXiv 2303.13005.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[3.0, 2.0, 1.0]])
        >>> nkd_loss(student, teacher, torch.tensor([0]))
        tensor(3.1681)
    """
    check_logits(student_logits, teacher_logits, labels)
    check_positive(temperature, "temperature")
    target, labelled = class_labels(labels, student_logits.shape[-1], "NKD", others=True, soft=True)
    student, teacher = widen(student_logits), widen(teacher_logits.detach())

    p, q = (soften(z).gather(-1, target.unsqueeze(-1)).squeeze(-1) for z in (teacher, student))
    others = cross_entropy_rows(
        log_among_others(teacher / temperature, target).exp(), log_among_others(student / temperature, target)
    )
    values = gamma * temperature**2 * others - p.exp() * q
    mask = labelled if mask is None else labelled & fit_mask(mask, values)
    return reduce(values, mask, reduction)


@register(
    Card(
        key="nkd",
        name="NKD",
        title="From Knowledge Distillation to Self-Knowledge Distillation: A Unified Approach with Normalized Loss and "
        "Customized Soft Labels",
        year=2023,
        arxiv="2303.13005",
        code="yzd-v/cls_KD",
        knowledge="response",
        equation=r"-p_y \log q_y - \gamma T^2 \sum_{c \ne y} \hat p_c \log \hat q_c",
        use="As DKD: where the teacher's other classes should count in full. It also weighs the labels by how much the "
        "teacher believes in them, which helps where some are wrong.",
        defaults={
            "gamma": "1.5, the paper's value for CNNs on ImageNet; 1 for transformers",
            "temperature": "1, the paper's value on ImageNet",
        },
        evidence="parity",
        evidence_note="value and gradient of yzd-v/cls_KD@1e5d48f (NKDLoss)",
        choices=("Of soft labels the largest is the target, as in the authors' code.",),
        needs=("labels",),
        with_labels={"cross_entropy": 1.0},
    ),
    nkd_loss,
)
class NKD(Objective):
    """Normalised KD loss; see ``limbeck.functional.nkd_loss``.

    Args:
        gamma: Weight of the other classes.
        temperature: T of the other classes.

    >>> loss = NKD(gamma=1.0)
    """

    contract = Contract(normalizer="labels", at_equal=None, mask=True, temperature="squared", spare_class=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, gamma: float = 1.5, temperature: float = 1.0) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        self.gamma, self.temperature = gamma, temperature

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return nkd_loss(
            student.logits,
            teacher.logits,
            batch.require("labels"),
            gamma=self.gamma,
            temperature=self.temperature,
            mask=batch.mask,
        )
