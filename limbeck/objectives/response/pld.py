"""Plackett-Luce distillation (PLD): the likelihood of the teacher's ranking of all classes, the true class first."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.labels import class_labels
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_logits, check_positive, fit_mask, reduce, widen
from limbeck.core.trace import Trace


def pld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    teacher_temperature: float = 1.0,
    student_temperature: float = 1.0,
    top: int | None = None,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""How unlikely the student finds the teacher's ranking of the classes, if it chose them one after the other.

    .. math::
        L = \sum_{k=1}^{C} q_{\pi_k} \left( -s_{\pi_k} + \log \sum_{l \ge k} e^{s_{\pi_l}} \right), \qquad
        q = \mathrm{softmax}(z^T / \tau_T), \quad s = z^S / \tau_S

    :math:`\pi_1` is the true class, the others follow in the teacher's order. Each choice is made among what is left,
    and counts as much as the teacher believes in it. The first choice alone is cross-entropy, weighted with
    :math:`q_y`. The loss is convex in the student's logits, and takes the place of cross-entropy and KD both.

    Args:
        student_logits: ``[B, *, C]``.
        teacher_logits: ``[B, *, C]``; detached.
        labels: Integers ``[B, *]``, negative where a place has no label; such a place does not count.
        teacher_temperature: :math:`\tau_T`, of the weights only; 1 in the paper's ImageNet runs, 4 on CIFAR-100.
        student_temperature: :math:`\tau_S`; 1 in the paper.
        top: Count the first so many choices only, for large vocabularies; the other classes stay in every sum.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over places that count and have a label, ``"sum"``, or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: No labels, soft labels, or shapes that differ.
        ConfigError: A temperature or ``top`` not above zero.

    Source:
        Bassam, Zhu and Bian, "PLD: A Choice-Theoretic List-Wise Knowledge Distillation", 2025, arXiv 2506.12542.

    Example:
        >>> teacher = torch.tensor([[4.0, 2.0, 1.0]]).log()
        >>> pld_loss(torch.zeros(1, 3), teacher, torch.tensor([0]))
        tensor(0.8258)
    """
    check_logits(student_logits, teacher_logits, labels)
    check_positive(teacher_temperature, "teacher_temperature")
    check_positive(student_temperature, "student_temperature")
    classes = student_logits.shape[-1]
    target, labelled = class_labels(labels, classes, "PLD")
    target = target.unsqueeze(-1)
    teacher = widen(teacher_logits.detach())
    student = widen(student_logits) / student_temperature
    # A class that the student rules out is finite here, so that no difference of infinities comes about.
    student = student.clamp(min=torch.finfo(student.dtype).min / 4)

    first = teacher.scatter(-1, target, math.inf)
    if top is None:
        ranking = first.argsort(dim=-1, descending=True, stable=True)
    else:
        check_positive(top, "top")
        ranking = first.topk(min(top, classes), dim=-1).indices
    weights = (teacher / teacher_temperature).softmax(dim=-1).gather(-1, ranking)
    chosen = student.gather(-1, ranking)
    left = chosen
    if ranking.shape[-1] < classes:
        rest = student.scatter(-1, ranking, -math.inf).logsumexp(dim=-1, keepdim=True)
        left = torch.cat([chosen, rest], dim=-1)
    among = left.flip(-1).logcumsumexp(dim=-1).flip(-1)[..., : ranking.shape[-1]]

    values = (weights * (among - chosen)).sum(dim=-1)
    mask = labelled if mask is None else labelled & fit_mask(mask, values)
    return reduce(values, mask, reduction)


@register(
    Card(
        key="pld",
        name="PLD",
        title="PLD: A Choice-Theoretic List-Wise Knowledge Distillation",
        year=2025,
        arxiv="2506.12542",
        knowledge="response",
        equation=r"\sum_k q_{\pi_k} \left( -s_{\pi_k} + \log \sum_{l \ge k} e^{s_{\pi_l}} \right), \quad \pi_1 = y",
        use="In the place of cross-entropy and KD together: one term without a weight to tune, which teaches the "
        "teacher's order of the classes and puts the label first where the teacher is wrong.",
        defaults={
            "teacher_temperature": "1, the best in the paper's ImageNet runs; 4 in those on CIFAR-100",
            "student_temperature": "1: the paper has none",
            "top": "all classes, as in the paper",
        },
        evidence="formula",
        evidence_note="the paper's equation written with loops, its closed-form gradient, and cross-entropy as the "
        "limit of a sure teacher; the authors released no code",
        choices=(
            "The weights are the teacher's probabilities in the ranking's order, neither sorted again nor normalised.",
            "Classes on which the teacher is undecided keep their order.",
            "top is not in the paper: later choices are left out of the sum, not of what is chosen among.",
        ),
        needs=("labels",),
        tasks=("classification", "language"),
    ),
    pld_loss,
)
class PLD(Objective):
    """Plackett-Luce distillation; see ``limbeck.functional.pld_loss``.

    Args:
        teacher_temperature: Of the weights.
        student_temperature: Of the student's logits.
        top: Count the first so many choices only.

    >>> loss = PLD()  # no cross-entropy beside it
    """

    contract = Contract(normalizer="labels", at_equal=None, mask=True, spare_class=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(
        self, teacher_temperature: float = 1.0, student_temperature: float = 1.0, top: int | None = None
    ) -> None:
        super().__init__()
        check_positive(teacher_temperature, "teacher_temperature")
        check_positive(student_temperature, "student_temperature")
        if top is not None:
            check_positive(top, "top")
        self.teacher_temperature, self.student_temperature, self.top = teacher_temperature, student_temperature, top

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        options = {n: getattr(self, n) for n in ("teacher_temperature", "student_temperature", "top")}
        return pld_loss(student.logits, teacher.logits, batch.require("labels"), mask=batch.mask, **options)
