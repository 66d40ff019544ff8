"""Decoupled knowledge distillation (DKD): the target class and the other classes, each with its own weight."""

from __future__ import annotations

import math

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import log_among_others
from limbeck.core.labels import class_labels
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_logits, check_positive, fit_mask, reduce, widen
from limbeck.core.schedules import WarmUp
from limbeck.core.trace import Trace


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""KD split into a target-class part and a non-target-class part, weighted apart.

    .. math::
        L &= T^2 \left( \alpha\, \mathrm{TCKD} + \beta\, \mathrm{NCKD} \right), \qquad p = \mathrm{softmax}(z / T) \\
        \mathrm{TCKD} &= \mathrm{KL}\left( (p^T_y, 1 - p^T_y) \,\|\, (p^S_y, 1 - p^S_y) \right) \\
        \mathrm{NCKD} &= \sum_{c \ne y} \hat p^T_c \log \frac{\hat p^T_c}{\hat p^S_c}, \qquad
        \hat p_c = \frac{p_c}{1 - p_y}

    With :math:`\alpha = 1` and, for each place, :math:`\beta = 1 - p^T_y` this is exactly KD. With two classes the
    second part is 0. Everything is computed from log-probabilities, so that a teacher that is sure costs no precision.

    Args:
        student_logits: ``[B, *, C]`` with two classes or more.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Integers ``[B, *]``, negative where a place has no label; such a place does not count.
        alpha: Weight of the target class; 1 in the paper.
        beta: Weight of the other classes; 8 is the paper's main setting (it uses 1 to 10, by the teacher).
        temperature: :math:`T`; 4 in the paper's CIFAR-100 runs.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count and have a label, ``"sum"``, or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: No labels, soft labels, fewer than two classes, or shapes that differ.
        ConfigError: A temperature that is not above zero.

    Source:
        Zhao et al., "Decoupled Knowledge Distillation", 2022, arXiv 2203.08679.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[3.0, 2.0, 1.0]])
        >>> dkd_loss(student, teacher, torch.tensor([0]))
        tensor(5.0100)
    """
    check_logits(student_logits, teacher_logits, labels)
    check_positive(temperature, "temperature")
    labels, labelled = class_labels(labels, student_logits.shape[-1], "DKD", others=True)
    target = labels.unsqueeze(-1)

    s_target, s_rest, s_others = _decouple(widen(student_logits) / temperature, target)
    t_target, t_rest, t_others = _decouple(widen(teacher_logits.detach()) / temperature, target)
    tckd = t_target.exp() * (t_target - s_target) + t_rest.exp() * (t_rest - s_rest)
    # A class the teacher rules out (a padded vocabulary) adds nothing, also where the student rules it out.
    others = (t_others.exp() * (t_others - s_others)).masked_fill(t_others == -math.inf, 0.0)
    nckd = others.sum(dim=-1)

    values = temperature**2 * (alpha * tckd + beta * nckd)
    mask = labelled if mask is None else labelled & fit_mask(mask, values)
    return reduce(values, mask, reduction)


def _decouple(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the target, of all others together, and of each among the others (0 at the target)."""
    log_p = logits.log_softmax(dim=-1)
    log_rest = log_p.scatter(-1, target, -math.inf).logsumexp(dim=-1)
    log_others = log_among_others(logits, target.squeeze(-1)).scatter(-1, target, 0.0)
    return log_p.gather(-1, target).squeeze(-1), log_rest, log_others


@register(
    Card(
        key="dkd",
        name="DKD",
        title="Decoupled Knowledge Distillation",
        year=2022,
        arxiv="2203.08679",
        code="megvii-research/mdistiller",
        knowledge="response",
        equation=r"T^2 \left( \alpha\, \mathrm{KL}(b^T \| b^S) + \beta\, \mathrm{KL}(\hat p^T \| \hat p^S) \right)",
        use="Where plain KD is held back by a sure teacher: what it says of the other classes then counts in full.",
        defaults={
            "alpha": "1, the paper's value",
            "beta": "8, the paper's main value; its CIFAR-100 runs take 1 to 10, more for surer teachers",
            "temperature": "4, the paper's value on CIFAR-100",
        },
        evidence="parity",
        evidence_note="value and gradient of megvii-research/mdistiller@a08d46f",
        choices=(
            "The warm-up over the first 20 of 240 epochs is its usual weight, not part of the loss: without it the "
            "student can be driven into answering everything alike.",
        ),
        needs=("labels",),
        with_labels={"cross_entropy": 1.0},
        weight=WarmUp(0.083),
    ),
    dkd_loss,
)
class DKD(Objective):
    """Decoupled knowledge distillation; see ``limbeck.functional.dkd_loss``.

    Args:
        alpha: Weight of the target class.
        beta: Weight of the other classes.
        temperature: T.

    >>> loss = WarmUp(0.083) * DKD(beta=2.0)
    """

    contract = Contract(normalizer="labels", mask=True, temperature="squared", spare_class=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        self.alpha, self.beta, self.temperature = alpha, beta, temperature

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        return dkd_loss(
            student.logits,
            teacher.logits,
            batch.require("labels"),
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
            mask=batch.mask,
        )
