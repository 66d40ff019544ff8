"""What the authors' script of CAKD trains with, which is another loss than their paper's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from limbeck.core.batch import Batch
from limbeck.core.layout import to_tokens
from limbeck.core.objective import Contract, DataInfo
from limbeck.core.precision import without_autocast
from limbeck.core.projectors import LinearProjector
from limbeck.core.reduction import Reduction, check_features, check_floating, check_logits, reduce, widen
from limbeck.core.relations import check_same_batch, gram, pooled
from limbeck.core.schedules import Schedule
from limbeck.core.trace import Trace
from limbeck.objectives.parts.map_to_tokens import MapToTokens


@without_autocast
def cakd_released_loss(
    student_qkv: Sequence[Tensor],
    teacher_qkv: Sequence[Tensor],
    student_feature: Tensor,
    teacher_feature: Tensor,
    student_token: Tensor,
    teacher_token: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    heads: int = 16,
    teacher_heads: int = 12,
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Squared distances of raw attention scores, of values, of logits, and of class and patch tokens.

    .. math::
        L &= 0.2\, \overline{\big(\tfrac{Q_S K_S^\top}{\sqrt{d_S h_S}} - \tfrac{Q_T K_T^\top}{\sqrt{d_T h_T}}\big)^2} +
            0.05\, \overline{\big(\tfrac{V_S V_S^\top}{\sqrt{d_S h_S}} - \tfrac{V_T V_T^\top}{h_T}\big)^2} \\
          &+ \overline{(z_S - z_T)^2} + \overline{(t_S - t_T)^2} + 0.05\, \overline{(f_S - f_T)^2}

    The mean over heads of what each head scores is the product of whole vectors over the number of heads; the teacher's
    values are not scaled there. Scores are taken before the softmax on both sides.

    Args:
        student_qkv: Three times ``[B, N, C]``.
        teacher_qkv: Three times ``[B, N, D]``; detached.
        student_feature, teacher_feature: Patch tokens ``[B, N, D]``.
        student_token, teacher_token: Class tokens ``[B, D]``.
        student_logits, teacher_logits: ``[B, C]``.
        heads: The student's projector is said to have.
        teacher_heads: Of the teacher's attention.
        mask: ``[B]`` booleans, True where a sample counts.
        reduction: ``"mean"`` over samples that count, ``"sum"``, or ``"none"`` (``[B]``).

    Source: ``yufanLIU/CrossArch_KD``, ``dist_train_cakd.py``.
    """
    for side, name in ((student_qkv, "student_qkv"), (teacher_qkv, "teacher_qkv")):
        for tensor in side:
            check_floating(tensor, name, least=3)
        check_same_batch(student_feature, side[0], "student_feature", name)
    check_features(student_feature, teacher_feature, least=3)
    check_features(student_token, teacher_token)
    check_logits(student_logits, teacher_logits)
    (q, k, v), (u, w, x) = (widen(t) for t in student_qkv), (widen(t.detach()) for t in teacher_qkv)
    scale, other = (q.shape[-1] * heads) ** -0.5, (u.shape[-1] * teacher_heads) ** -0.5
    gaps = (
        (0.2, scale * gram(q, k) - other * gram(u, w)),
        (0.05, scale * gram(v) - gram(x) / teacher_heads),
        (1.0, widen(student_logits) - widen(teacher_logits.detach())),
        (1.0, widen(student_token) - widen(teacher_token.detach())),
        (0.05, widen(student_feature) - widen(teacher_feature.detach())),
    )
    each = [weight * gap.square().flatten(1).mean(dim=1) for weight, gap in gaps]
    return reduce(sum(each[1:], each[0]), mask, reduction)


@dataclass(frozen=True)
class ReleasedRamp(Schedule):
    r"""The weight of the whole in the authors' script, :math:`\min(\max(e - 25, 0) / 50,\ 0.2)` at epoch e.

    >>> ramp = ReleasedRamp(epochs=120)
    >>> [round(float(ramp(e / 120)), 4) for e in (0, 25, 30, 60, 120)]
    [0.0, 0.0, 0.1, 0.2, 0.2]
    """

    epochs: float = 120.0

    def at(self, progress: Tensor) -> Tensor:
        return ((progress * self.epochs - 25.0) / 50.0).clamp(0.0, 0.2)


class Released(MapToTokens):
    """The loss of the authors' script, without its judge, whose input the script cuts off from the student.

    Args:
        tap, teacher_tap, attention: As ``MapToTokens``.
        teacher_heads: Of the teacher's attention.
    """

    contract = Contract(at_equal=None)

    def __init__(self, tap: str, teacher_tap: str, attention: int, teacher_heads: int) -> None:
        super().__init__(tap, teacher_tap, attention, ("penultimate", "logits"))
        self.teacher_heads = teacher_heads

    def setup(self, student: Trace, teacher: Trace, batch: Batch, data: DataInfo) -> None:
        own, _, goal = self.features(student, teacher)
        self.learn(own, goal, own.shape[1], kernel=1)
        width, other = (pooled(t["penultimate"])[0].shape[1] for t in (student, teacher))
        self.token = LinearProjector(width, other).to(own.device)

    def forward(self, student: Trace, teacher: Trace, batch: Batch) -> Tensor:
        own, qkv, goal = self.features(student, teacher)
        crossed, tokens = self.projected(own)
        token, other = (pooled(t["penultimate"])[0] for t in (student, teacher))
        return cakd_released_loss(
            crossed,
            qkv,
            tokens,
            to_tokens(goal),
            self.token(token),
            other,
            student.logits,
            teacher.logits,
            teacher_heads=self.teacher_heads,
        )
