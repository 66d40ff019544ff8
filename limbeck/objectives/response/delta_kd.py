"""Delta-KD: the student is to change as its teacher was changed by fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.catalogue import Card, register
from limbeck.core.divergences import kl_rows, soften, softened_divergence
from limbeck.core.errors import ConfigError
from limbeck.core.objective import Contract, Objective
from limbeck.core.reduction import Reduction, check_floating, check_positive, check_same_shape
from limbeck.core.trace import Trace


def delta_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    raw_teacher_logits: Tensor,
    raw_student_logits: Tensor,
    strength: float = 1.0,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Divergence from the raw student's prediction, shifted as fine-tuning has shifted the teacher's.

    .. math:: L = T^2\, \mathrm{KL}\left( \mathrm{softmax}(z^* / T) \,\|\, \mathrm{softmax}(z^S / T) \right), \qquad
        z^* = z^{S_0} + a \left( z^T - z^{T_0} \right)

    Args:
        student_logits: ``[B, *, C]``, of the student that learns.
        teacher_logits: :math:`z^T`, ``[B, *, C]``, of the fine-tuned teacher; detached, as the other two.
        labels: Not used; taken so that all response losses are called alike.
        raw_teacher_logits: :math:`z^{T_0}`, ``[B, *, C]``, of the teacher before its fine-tuning.
        raw_student_logits: :math:`z^{S_0}`, ``[B, *, C]``, of the student before it learnt.
        strength: :math:`a`; 1 copies the teacher's change, 0 holds the student where it began.
        temperature: T.
        mask: ``[B]`` or ``[B, *]`` booleans, True where a place counts.
        reduction: ``"mean"`` over counted places, ``"sum"`` or ``"none"`` (``[B, *]``).

    Raises:
        TensorError: Shapes or dtypes do not fit.
        ConfigError: A temperature that is not above zero.

    Source: Cao et al., "Delta Knowledge Distillation for Large Language Models", 2025, arXiv 2509.14526.

    >>> student, tuned, raw = torch.tensor([[[0.0, 1.0, 0.0]], [[2.0, 0.0, 0.0]], [[1.0, 0.0, 0.0]]])
    >>> delta_kd_loss(student, tuned, raw_teacher_logits=raw, raw_student_logits=student)
    tensor(0.1118)
    """
    others = {"teacher_logits": teacher_logits, "raw_teacher_logits": raw_teacher_logits}
    for name, logits in (others | {"raw_student_logits": raw_student_logits}).items():
        check_floating(logits, name, least=2)
        check_same_shape(student_logits, logits, "student_logits", name)
    target = shifted(raw_student_logits.detach(), teacher_logits.detach(), raw_teacher_logits.detach(), strength)
    return softened_divergence(
        kl_rows, student_logits, target, labels, temperature=temperature, mask=mask, reduction=reduction
    )


def shifted(start: Tensor, to: Tensor, origin: Tensor, strength: float = 1.0) -> Tensor:
    """Logits ``start + strength * (to - origin)``, all three as logarithms of probabilities: the fourth corner.

    What ``start`` or ``to`` rules out stays ruled out; what only ``origin`` rules out does not move.

    >>> start, to, origin = torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    >>> shifted(start, to, origin).softmax(0)
    tensor([0.4223, 0.4223, 0.1554])
    """
    start, to, origin = soften(start), soften(to), soften(origin)
    out = (start == -torch.inf) | (to == -torch.inf)
    shift = (to - origin).masked_fill(out | (origin == -torch.inf), 0.0)
    return (start + strength * shift).masked_fill(out, -torch.inf)


@register(
    Card(
        key="delta_kd",
        name="Delta-KD",
        title="Delta Knowledge Distillation for Large Language Models",
        year=2025,
        arxiv="2509.14526",
        knowledge="response",
        equation=r"T^2\,\mathrm{KL}\big(\mathrm{softmax}((z^{S_0} + a (z^T - z^{T_0})) / T) \,\|\, "
        r"\mathrm{softmax}(z^S / T)\big)",
        use="Where both models were pre-trained and only the teacher was fine-tuned, and all three stand at hand: the "
        "student learns what the fine-tuning changed, and keeps its own ground. Three frozen models run each step.",
        defaults={
            "strength": "1, the whole change",
            "temperature": "1: the paper leaves it open",
        },
        evidence="reading",
        choices=(
            "What was read ends before the formula of the shift; this is the parallelogram of logarithms, by which "
            "the student's target is to the raw student what the fine-tuned teacher is to the raw one.",
            "The target is a constant, since the paper tells that other forms were hard to train.",
            "The paper's weight of the labels is not known; one half each.",
        ),
        tasks=("language", "several teachers"),
        with_labels={"cross_entropy": 0.5},
        weight=0.5,
        cost="Three frozen models answer each batch instead of one.",
    ),
    delta_kd_loss,
)
class DeltaKD(Objective):
    """Delta-KD; see ``limbeck.functional.delta_kd_loss``.

    Its teacher is three: ``SeveralTeachers([fine_tuned_teacher, raw_teacher, raw_student])``.

    Args:
        strength: How much of the teacher's change.
        temperature: T.

    >>> loss = 0.5 * DeltaKD()
    """

    contract = Contract(normalizer="positions", mask=True, temperature="squared", spare_class=True)
    student_taps = teacher_taps = ("logits",)

    def __init__(self, strength: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__()
        check_positive(temperature, "temperature")
        self.strength, self.temperature = strength, temperature

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        if len(teacher.members) != 3:
            raise ConfigError(
                "this needs three models to answer",
                where="teacher",
                found=f"{len(teacher.members) or 1}",
                remedy="teach with SeveralTeachers([fine_tuned_teacher, raw_teacher, raw_student])",
            )
        to, origin, start = (member.logits for member in teacher.members)
        return delta_kd_loss(
            student.logits,
            to,
            raw_teacher_logits=origin,
            raw_student_logits=start,
            strength=self.strength,
            temperature=self.temperature,
            mask=batch.mask,
        )
